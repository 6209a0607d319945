"""Files in MNIST's idx format -> images and labels as tensors; also cuts the repository's sample."""

import argparse
import gzip
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.options import REPOSITORY
from vmap_ensemble.offline import idx
from vmap_ensemble.offline.inputs import InputError

SAMPLE_DIR = REPOSITORY / "data" / "mnist"
DOWNLOAD_DIR = REPOSITORY / ".cache" / "mnist"
# Of the training images, as in PyTorch's MNIST example: members must be served with what trained them.
MEAN, DEVIATION = 0.1307, 0.3081
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SAMPLE_STEP = {"train": 10, "test": 5}


class DataError(Exception):
    """A data file is missing, or is not what its name says."""


@dataclass(frozen=True)
class Digits:
    """One split: images (N, 28, 28) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path, ndim: int) -> Tensor:
    """As `vmap_ensemble.offline.idx.read_idx`: a uint8 tensor.

    Raises:
        DataError: the file is damaged.
    """
    try:
        # A copy, as the buffer of a bytes object can't be written to and torch wants one that can.
        return torch.from_numpy(idx.read_idx(path, ndim).copy())
    except InputError as error:
        raise DataError(str(error)) from error


def write_idx(path: Path, values: Tensor) -> None:
    """Write a uint8 tensor as a gzipped idx file; the same tensor gives the same bytes every time."""
    header = struct.pack(f">I{values.dim()}I", (idx.UNSIGNED_BYTE << 8) | values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes(), compresslevel=9, mtime=0))


def find_file(folder: Path, name: str) -> Path:
    """Find an idx file in a folder, or where torchvision puts it below one (MNIST/raw)."""
    path = idx.find_idx(folder, name)
    if path is not None:
        return path
    raise DataError(
        f"{folder}: expected {name}.gz or {name} in it or in its MNIST/raw; "
        "give --data-dir a folder with MNIST's four files, or --download to fetch them"
    )


def load_digits(folder: Path, split: str) -> Digits:
    """Load one split of MNIST.

    Args:
        folder: holds the four idx files, gzipped or not, in itself or in MNIST/raw.
        split: "train" or "test".

    Returns:
        Its images and labels.

    Raises:
        DataError: a file is missing or damaged, the two files do not fit together, or a label is no digit.
    """
    image_path, label_path = (find_file(folder, name) for name in FILES[split])
    images, labels = read_idx(image_path, ndim=3), read_idx(label_path, ndim=1)
    if tuple(images.shape[1:]) != (28, 28):
        raise DataError(f"{image_path}: expected images of 28x28, got {images.shape[1]}x{images.shape[2]}")
    if len(images) != len(labels):
        raise DataError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels")
    if len(labels) and int(labels.max()) > 9:
        raise DataError(f"{label_path}: expected labels 0 to 9, got {int(labels.max())}")
    return Digits(images, labels.long())


def normalise(images: Tensor) -> Tensor:
    """Turn (N, 28, 28) uint8 into (N, 1, 28, 28) float32 with MNIST's mean 0 and deviation 1."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(DEVIATION)


def resolve_folder(data_dir: Path | None, download: bool) -> Path:
    """Decide where the data comes from.

    Args:
        data_dir: a folder that must hold the data; None for what was downloaded earlier, or else the
            repository's sample.
        download: fetch the full set first, into data_dir or .cache/mnist.

    Returns:
        The folder to give load_digits.
    """
    if download:
        folder = data_dir or DOWNLOAD_DIR
        fetch_full_set(folder)
        return folder
    if data_dir is not None:
        return data_dir
    return DOWNLOAD_DIR if (DOWNLOAD_DIR / "MNIST" / "raw").is_dir() else SAMPLE_DIR


def fetch_full_set(folder: Path) -> None:
    """Download MNIST's four files through torchvision, which checks their MD5.

    Raises:
        DataError: no mirror answered.
    """
    from torchvision.datasets import MNIST  # imported here, since only a download needs it

    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{folder}: MNIST could not be downloaded ({error}); "
            "leave out --download to train on the repository's sample"
        ) from error


def make_sample(source: Path, target: Path) -> None:
    """Cut the sample out of the full set: idx files below mnist, one PNG a digit below digits."""
    for folder in (target / "mnist", target / "digits"):
        folder.mkdir(parents=True, exist_ok=True)
    for split, names in FILES.items():
        digits = load_digits(source, split)
        # Evenly spaced, as the two halves of the test set were written by different groups of people.
        kept = slice(None, None, SAMPLE_STEP[split])
        write_idx(target / "mnist" / f"{names[0]}.gz", digits.images[kept])
        write_idx(target / "mnist" / f"{names[1]}.gz", digits.labels[kept].byte())
    test = load_digits(target / "mnist", "test")
    for digit in range(10):
        first = int((test.labels == digit).nonzero()[0])
        Image.fromarray(test.images[first].numpy()).save(target / "digits" / f"{digit}.png", optimize=True)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    source, target = options.make_sample
    try:
        make_sample(source, target)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
