"""A network and a count -> distinct checkpoints, pictures, the loop's probabilities, and every rival's archives."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torchvision import transforms

from archiver.blocks.request import make_request
from archiver.build import build_archive
from benchmarks.draw_sample_image import draw_landscape
from benchmarks.serve.stock.resnet18 import Network
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.models.mnist import MnistNet

ROOT = Path(__file__).resolve().parents[2]
STOCK = Path(__file__).resolve().parent / "stock"
CLASSES = 10  # few enough that every rival answers with all of them, and the answers are as long


@dataclass(frozen=True)
class Subject:
    """What is served.

    Attributes:
        build: makes one member with random weights.
        model_file: defines its class, for stock archives.
        handler: of our archive.
        architecture: as our settings name it.
        input: what the stock handlers are told they are sent: `photo` or `digit`.
        transform: image -> (C, H, W) input, written down a second time for the reference.
        read_bodies: the pictures that are sent.
    """

    build: Callable[[], nn.Module]
    model_file: Path
    handler: str
    architecture: str
    input: str
    transform: Callable[[Image.Image], Tensor]
    read_bodies: Callable[[], list[bytes]]


def draw_photos() -> list[bytes]:
    """Eight JPEG files of 640x480 pixels, all different."""
    files = []
    for seed in range(8):
        buffer = io.BytesIO()
        draw_landscape(seed).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def read_digits() -> list[bytes]:
    """The digits of data/digits, PNG files of 28x28 pixels."""
    return [path.read_bytes() for path in sorted((ROOT / "data" / "digits").glob("*.png"))]


SUBJECTS = {
    "mnist": Subject(
        MnistNet, ROOT / "handlers" / "vmap_ensemble" / "models" / "mnist.py", "mnist_handler.py", "mnist", "digit",
        transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]), read_digits,
    ),
    "resnet18": Subject(
        Network, STOCK / "resnet18.py", "resnet_handler.py", "torchvision:resnet18", "photo",
        transforms.Compose([
            transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]), draw_photos,
    ),
}  # fmt: skip


def write_members(subject: Subject, count: int, folder: Path) -> list[Path]:
    """Write one checkpoint per seed; every weight and every batch statistic differs."""
    files = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = subject.build().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        files.append(folder / f"member{seed}.pt")
        torch.save(network.state_dict(), files[-1])
    return files


@torch.inference_mode()
def loop_probabilities(subject: Subject, files: list[Path], bodies: list[bytes]) -> Tensor:
    """(pictures, classes) mean probabilities of a plain loop over the checkpoints."""
    x = torch.stack([subject.transform(Image.open(io.BytesIO(body))) for body in bodies])
    total = torch.zeros(len(bodies), CLASSES)
    for file in files:
        network = subject.build().eval()
        network.load_state_dict(torch.load(file, weights_only=True))
        total += network(x).softmax(1)
    return total / len(files)


def pack_ours(subject: Subject, files: list[Path], folder: Path, execution: str) -> Path:
    """Build our archive as ./archive.sh does."""
    block = {
        "handler": subject.handler, "architecture": subject.architecture, "members": [str(file) for file in files],
        "top_k": CLASSES, "execution": execution,
    }  # fmt: skip
    return pack_block("ours", block, folder)


def pack_block(name: str, block: dict[str, Any], folder: Path, no_check: bool = False) -> Path:
    """Build the archive of a block as ./archive.sh does, without its tables; `no_check`: nor load it."""
    request = make_request(name, {name: block}, ROOT, no_check=no_check)
    with open(os.devnull, "w") as nowhere:
        return build_archive(request, folder, force=True, console=Console(file=nowhere))


def pack_stock(
    subject: Subject, name: str, handler: str, file: Path, folder: Path, others: tuple[Path, ...] = ()
) -> Path:
    """Build an archive of one of the stock handlers with torch-model-archiver."""
    command = ["--model-name", name, "--version", "1.0", "--handler", str(STOCK / handler)]
    command += ["--model-file", str(subject.model_file), "--serialized-file", str(file)]
    copies = []
    for index, other in enumerate(others):
        copies.append(folder / f"other{index:02}.pt")
        copies[-1].unlink(missing_ok=True)
        copies[-1].symlink_to(other)
    if copies:
        command += ["--extra-files", ",".join(map(str, copies))]
    run_archiver("torch-model-archiver", [*command, "--export-path", str(folder), "--force"], folder)
    return folder / f"{name}.mar"


def pack_workflow(count: int, batching: dict[str, int], folder: Path) -> Path:
    """Build the workflow that asks m0, m1, … and averages what they answer, with torch-workflow-archiver."""
    names = [f"m{index}" for index in range(count)]
    shared = {
        "min-workers": 1, "max-workers": 1, "batch-size": batching["batchSize"],
        "max-batch-delay": batching["maxBatchDelay"], "retry-attempts": 1, "timeout-ms": 120_000,
    }  # fmt: skip
    models = {**shared, **{name: {"url": f"{name}.mar", **shared} for name in names}}
    spec = folder / "workflow.yaml"
    dag = {"receive": names, **{name: ["average"] for name in names}}
    spec.write_text(yaml.safe_dump({"models": models, "dag": dag}))
    command = ["--workflow-name", "ens", "--spec-file", str(spec), "--handler", str(STOCK / "workflow.py")]
    run_archiver("torch-workflow-archiver", [*command, "--export-path", str(folder), "--force"], folder)
    return folder / "ens.war"


def run_archiver(program: str, arguments: list[str], folder: Path) -> None:
    """Run one of TorchServe's archivers.

    Raises:
        EnsembleError: it is not installed, or fails.
    """
    path = Path(sys.executable).parent / program
    if not path.is_file():
        raise EnsembleError(f"{program} is not installed: pip install -r requirements-bench.txt")
    # It works in <temp>/<model name> and deletes that first.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder)}
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise EnsembleError(f"{program} failed: {(done.stderr.strip().splitlines() or [json.dumps(arguments)])[-1]}")
