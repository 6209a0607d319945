"""A photo, decoded whole and scaled -> rows of times and differences."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import functional as F

from benchmarks.measuring.measure import describe_machine, describe_versions, measure_interleaved, write_json
from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser, allocate_rows
from vmap_ensemble.tasks.images.decoding import decode_image

MARGINS = (None, 1, 2, 4)
PIXELS = 200_000_000


def read_versions(photo: Path, factors: list[float], quality: int) -> Iterator[tuple[str, bytes]]:
    """A photo's own file, and JPEG files of it enlarged."""
    image = Image.open(photo).convert("RGB")
    yield f"{photo.name} {image.width}x{image.height}", photo.read_bytes()
    for factor in factors:
        larger = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        larger.save(buffer, "JPEG", quality=quality)
        yield f"{photo.name} {larger.width}x{larger.height}", buffer.getvalue()


def load_members(options: argparse.Namespace) -> list[nn.Module]:
    """ResNet-18 members in eval mode."""
    states = [torch.load(file, weights_only=True) for file in options.checkpoints]
    members = []
    for seed in range(len(states) or options.members):
        torch.manual_seed(seed)
        member = resnet18().eval()
        if states:
            member.load_state_dict(states[seed])
        members.append(member)
    return members


def prepare(data: bytes, margin: int | None) -> Tensor:
    """(1, 3, 224, 224): the network's input, decoded whole (None) or scaled to this many times the side it needs."""
    preset = ResNet18_Weights.DEFAULT.transforms()
    short_side = preset.resize_size[0]
    image = decode_image(data, "RGB", PIXELS, None if margin is None else margin * short_side)
    image = F.resize(image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias)
    batch = allocate_rows(1, (3, *preset.crop_size * 2))
    PixelNormaliser(preset.mean, preset.std).write(F.center_crop(image, preset.crop_size), batch[0])
    return batch


@torch.inference_mode()
def ask_members(members: list[nn.Module], batch: Tensor) -> Tensor:
    """(1, 1000) mean probabilities."""
    return torch.stack([member(batch).softmax(-1) for member in members]).mean(0)


def compare(name: str, data: bytes, members: list[nn.Module], calls: int) -> list[dict[str, Any]]:
    """One row per way to decode a file."""
    ways: dict[str, Callable[[], Tensor]] = {
        "whole" if margin is None else f"at least {margin}x": partial(prepare, data, margin) for margin in MARGINS
    }
    timings = measure_interleaved(ways, torch.device("cpu"), warmup=3, iterations=calls, block=5)
    whole = ways["whole"]()
    expected = ask_members(members, whole)
    deviation = torch.tensor(ResNet18_Weights.DEFAULT.transforms().std)[:, None, None]
    rows = []
    for timing in timings:
        batch = ways[timing.name]()
        steps = ((batch - whole) * deviation * 255).abs()
        got = ask_members(members, batch)
        rows.append({
            "photo": name, "way": timing.name, "median_ms": timing.median_ms, "p90_ms": timing.p90_ms,
            "ratio": timings[0].median_ms / timing.median_ms,
            "largest_steps": float(steps.max()), "mean_steps": float(steps.mean()),
            "largest_probability": float((got - expected).abs().max()),
            "largest_relative": float(((got - expected).abs() / expected).max()),
            "same_class": bool(got.argmax() == expected.argmax()),
        })  # fmt: skip
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table as the documentation shows it."""
    print("| photo | decoded | median | p90 | ratio | pixel: largest, mean | probability: largest, relative |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['photo']} | {row['way']} | {row['median_ms']:.2f} ms | {row['p90_ms']:.2f} ms "
            f"| {row['ratio']:.2f}x | {row['largest_steps']:.0f}, {row['mean_steps']:.2f} "
            f"| {row['largest_probability']:.0e}, {row['largest_relative']:.1%} |"
            + ("" if row["same_class"] else " another class")
        )


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)  # decoding has no more
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("pillow", "torchvision")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    members = load_members(options)
    rows = []
    for photo in options.photos:
        for name, data in read_versions(photo, options.enlarge, options.quality):
            rows += compare(name, data, members, options.calls)
    print_rows(rows)
    if options.json:
        setting = {key: str(value) for key, value in vars(options).items() if key != "json"}
        write_json(options.json, machine, [], table="scaled_decoding", setting=setting, rows=rows)
    return 0
