"""Turns files in MNIST's idx format, plain or gzipped, into arrays."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from vmap_ensemble.offline.inputs import InputError

UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """An idx file in a folder, or where torchvision puts it below one (MNIST/raw); gzipped ones first."""
    places = [parent / file for parent in (folder, folder / "MNIST" / "raw") for file in (f"{name}.gz", name)]
    return next((path for path in places if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read one idx file of unsigned bytes.

    Args:
        path: The file; one that ends in .gz is decompressed.
        ndim: Number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array of the shape that the header states; it can't be written to.

    Raises:
        InputError: It can't be read, isn't gzip, has another magic number, or more or fewer bytes than its header
            states.

    Source: http://yann.lecun.com/exdb/mnist/ (the format, at the end of the page)
    """
    raw = _read_bytes(path)
    header_bytes = 4 + 4 * ndim
    if len(raw) < header_bytes:
        raise InputError(f"{path}: expected a header of {header_bytes} bytes, got a file of {len(raw)}")
    magic, expected = struct.unpack(">I", raw[:4])[0], (UNSIGNED_BYTE << 8) | ndim
    if magic != expected:
        raise InputError(
            f"{path}: expected the magic number {expected} (unsigned bytes, {ndim} dimensions), got {magic}"
        )
    shape = struct.unpack(f">{ndim}I", raw[4:header_bytes])
    if len(raw) - header_bytes != math.prod(shape):
        raise InputError(
            f"{path}: its header states {shape}, {math.prod(shape)} bytes, got {len(raw) - header_bytes}; "
            "the file is truncated or damaged, fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header_bytes).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: can't be read: not a whole gzip file ({error}); fetch it again") from error
