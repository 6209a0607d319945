"""Turns images into rows of one batch tensor, each written where it stays by whatever thread decodes it.

Stacking decoded images would copy the whole batch once more, in torch's parallel loops: behind each of these the
helper threads spin for milliseconds, on the cores that decode or compute. NumPy computes on the calling thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Pixels hold 8 bits; PyTorch's ToTensor divides by the largest value, too.
WHITE = np.float32(255)


def allocate_rows(count: int, shape: Sequence[int], channels_last: bool = False, pinned: bool = False) -> Tensor:
    """An unfilled float32 batch on the host.

    Args:
        count: B.
        shape: (C, H, W) of an example.
        channels_last: Whether the channels of a pixel lie side by side, as convolutions on a CPU want them and as
            images are decoded.
        pinned: Whether the memory is page-locked, so that a GPU copies from it while the host goes on.

    Returns:
        (B, C, H, W) float32.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((count, *shape), dtype=torch.float32, memory_format=layout, pin_memory=pinned)


def join_rows(examples: Sequence[Tensor]) -> Tensor | None:
    """The batch whose rows the examples are, without a copy; None if they don't lie side by side.

    Args:
        examples: (C, H, W) each.

    Returns:
        (B, C, H, W), sharing the examples' memory.
    """
    first = examples[0]
    step = first.numel()
    for index, row in enumerate(examples):
        if (
            row.shape != first.shape
            or row.stride() != first.stride()
            or row.dtype != first.dtype
            or row.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or row.storage_offset() != first.storage_offset() + index * step
        ):
            return None
    return first.as_strided((len(examples), *first.shape), (step, *first.stride()))


def copy_rows(examples: Sequence[Tensor], channels_last: bool = False, pinned: bool = False) -> Tensor:
    """A new batch of examples that lie apart: (C, H, W) float32 each -> (B, C, H, W)."""
    batch = allocate_rows(len(examples), examples[0].shape, channels_last, pinned)
    for row, example in zip(batch.unbind(), examples, strict=True):
        np.copyto(row.numpy(), example.numpy())
    return batch


class PixelNormaliser:
    """Writes (pixel / 255 - mean) / deviation of an image into its row, as torchvision's ToTensor and Normalize give.

    Args:
        mean: One per channel.
        deviation: Standard deviation, one per channel, none of them 0.

    Note:
        Bit for bit what torchvision computes: the same float32 operations in the same order, in place.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self._values = np.array([mean, deviation], dtype=np.float32)
        self._lines: dict[int, np.ndarray] = {}

    def write(self, image: Image.Image, row: Tensor) -> None:
        """Fill a row.

        Args:
            image: W x H pixels of 8 bits a channel, C channels.
            row: (C, H, W) float32 on the host, of any memory format.
        """
        pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1)  # (H, W, C), of a grey image as well
        out = row.numpy().transpose(1, 2, 0)
        if out.flags.c_contiguous:
            height, width, channels = out.shape
            lines = (height, width * channels)
            _normalise(pixels.reshape(lines), out.reshape(lines), *self._repeat(width))
            return
        for channel, values in enumerate(self._values.T):
            _normalise(pixels[..., channel], out[..., channel], *values)

    def _repeat(self, width: int) -> np.ndarray:
        """(2, W * C): for whole lines of pixels at once; pixel by pixel the inner loop would be of three values."""
        if width not in self._lines:
            self._lines[width] = np.tile(self._values, width)
        return self._lines[width]


def _normalise(pixels: np.ndarray, out: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
    np.divide(pixels, WHITE, out=out)
    np.subtract(out, mean, out=out)
    np.divide(out, deviation, out=out)
