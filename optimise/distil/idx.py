"""Turns a folder with MNIST's idx files, plain or gzipped, into images and labels."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from optimise.distil.errors import DistilError

TRAIN, TEST = "train", "t10k"
_UNSIGNED_BYTE = 0x08


def holds_idx(folder: Path, part: str = TRAIN) -> bool:
    """Whether a folder holds the images of a part, in itself or in MNIST/raw, where torchvision puts them."""
    return folder.is_dir() and _find(folder, f"{part}-images-idx3-ubyte") is not None


def read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, height, width) uint8 images and (N,) uint8 labels of a part.

    Raises:
        DistilError: A file is missing or damaged, or the two don't fit together.
    """
    images, labels = (
        _read(folder, f"{part}-{name}-ubyte", n) for name, n in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels):
        raise DistilError(f"{folder.name}: {part}: {len(images)} images, but {len(labels)} labels")
    if not len(images):
        raise DistilError(f"{folder.name}: {part}: holds no image")
    return images, labels


def _find(folder: Path, name: str) -> Path | None:
    places = [parent / file for parent in (folder, folder / "MNIST" / "raw") for file in (f"{name}.gz", name)]
    return next((path for path in places if path.is_file()), None)


def _read(folder: Path, name: str, ndim: int) -> np.ndarray:
    path = _find(folder, name)
    if path is None:
        raise DistilError(f"{folder.name}: expected {name}.gz or {name} beside the other idx files")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DistilError(f"{path.name}: can't be read ({error})") from None
    start = 4 + 4 * ndim
    if len(raw) < start or struct.unpack(">I", raw[:4])[0] != (_UNSIGNED_BYTE << 8) | ndim:
        raise DistilError(f"{path.name}: no idx file of unsigned bytes in {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DistilError(f"{path.name}: its header says {shape}, {math.prod(shape)} bytes, got {len(raw) - start}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
