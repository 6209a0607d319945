"""Turns a folder with MNIST's idx files, plain or gzipped, into images and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from optimise.errors import OptimiseError
from vmap_ensemble.offline.idx import find_idx, read_idx

TRAIN, TEST = "train", "t10k"


def holds_idx(folder: Path, part: str = TRAIN) -> bool:
    """Whether a folder holds the images of a part, in itself or in MNIST/raw, where torchvision puts them."""
    return folder.is_dir() and find_idx(folder, f"{part}-images-idx3-ubyte") is not None


def read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, height, width) uint8 images and (N,) uint8 labels of a part.

    Raises:
        OptimiseError: A file is missing, or the two don't fit together.
        InputError: A file is damaged.
    """
    images, labels = (
        _read(folder, f"{part}-{name}-ubyte", n) for name, n in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels):
        raise OptimiseError(f"{folder.name}: {part}: {len(images)} images, but {len(labels)} labels")
    if not len(images):
        raise OptimiseError(f"{folder.name}: {part}: holds no image")
    return images, labels


def _read(folder: Path, name: str, ndim: int) -> np.ndarray:
    path = find_idx(folder, name)
    if path is None:
        raise OptimiseError(f"{folder.name}: expected {name}.gz or {name} beside the other idx files")
    return read_idx(path, ndim)
