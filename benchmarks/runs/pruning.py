"""Draws digits in colour, trains ResNet-18 members on them, and cuts channels by `vmap-ensemble prune`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18

from optimise.gate.report import as_markdown
from training.runs.mnist_data import load_digits, resolve_folder

SIDE, CLASSES, BATCH = 32, 10, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Least distance of a digit's colour to its ground's, of 255 in each channel.
CONTRAST = 150
SPLITS = {"learn": "train", "test": "test"}


def draw_in_colour(images: Tensor, seed: int) -> np.ndarray:
    """(N, 28, 28) grey levels -> (N, SIDE, SIDE, 3) uint8 in two colours each."""
    random = np.random.default_rng(seed)
    ink, ground = (random.integers(0, 256, (2, len(images), 1, 1, 3))).astype(np.float32)
    close = np.abs(ink - ground).sum(-1, keepdims=True) < CONTRAST
    ink = np.where(close, 255 - ink, ink)
    share = F.interpolate(images[:, None].float() / 255, size=(SIDE, SIDE), mode="bilinear")[:, 0, :, :, None].numpy()
    return (share * ink + (1 - share) * ground).round().astype(np.uint8)


def write_pictures(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Files in folders named by their digit, and the same as (N, 3, SIDE, SIDE) float32 and (N,) labels by split."""
    source, found = resolve_folder(None, download=False), {}
    for seed, (name, split) in enumerate(SPLITS.items()):
        digits = load_digits(source, split)
        pictures = draw_in_colour(digits.images.reshape(-1, 28, 28), seed)
        for number, (picture, label) in enumerate(zip(pictures, digits.labels.tolist(), strict=True)):
            own = folder / name / str(label)
            own.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(own / f"{number}.png")
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        found[name] = ((x - mean) / std, digits.labels)
    return found


def train_member(x: Tensor, y: Tensor, seed: int, epochs: int) -> dict[str, Tensor]:
    """ResNet-18's state dict after AdamW under one cycle, the digits moved by up to two pixels."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            down, across = torch.randint(-2, 3, (2,)).tolist()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[rows].roll((down, across), (2, 3))), y[rows]).backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed}: epoch {epoch + 1} of {epochs}", file=sys.stderr)
    return model.state_dict()


def make_archive(output: Path, members: int, epochs: int) -> Path:
    """Train members and pack them, as far as that isn't done."""
    from archiver.__main__ import main as archive

    pictures = write_pictures(output / "pictures")
    (output / "members").mkdir(exist_ok=True)
    for seed in range(1, members + 1):
        path = output / "members" / f"seed{seed}.pt"
        if not path.is_file():
            torch.save(train_member(*pictures["learn"], seed, epochs), path)
    block = {
        "handler": "resnet_handler.py",
        "architecture": "torchvision:resnet18",
        "input_shape": [3, SIDE, SIDE],
        "resize": SIDE,
        "labels": "labels.json",
        "members": ["members"],
    }
    (output / "labels.json").write_text(json.dumps({str(digit): str(digit) for digit in range(CLASSES)}))
    (output / "setup_config.json").write_text(json.dumps({"colour_digits": block}))
    config = str(output / "setup_config.json")
    if archive(["colour_digits", "--no-check", "--force", "--config", config, "--output", str(output)]):
        raise SystemExit(1)
    return output / "colour_digits.mar"


def run(options: argparse.Namespace) -> int:
    """Train, pack, prune and print the table; returns the exit code of `prune`."""
    from optimise.prune.command import main as prune

    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    archive = make_archive(options.output, options.members, options.epochs)
    pictures, pruned = options.output / "pictures", options.output / "pruned"
    given = {"--data": pictures / "learn", "--test": pictures / "test", "--output": pruned, "--keep": options.keep}
    given |= {"--epochs": options.epochs, "--threads": options.threads}
    code = prune([str(archive), *(str(part) for pair in given.items() for part in pair)])
    if (pruned / "report.json").is_file():
        report = json.loads((pruned / "report.json").read_text(encoding="utf-8"))
        times = [report[name]["latency_ms"] for name in ("ensemble", "pruned")]
        print(as_markdown(report))
        print(", ".join(f"batch {size}: {times[0][size] / times[1][size]:.2f}x as fast" for size in times[0]))
    return code
