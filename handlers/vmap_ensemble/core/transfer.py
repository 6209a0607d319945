"""Turns small tensors of a device into the same on the host, by one copy instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the CPU; those that are there stay as they are.

    Args:
        tensors: Of any shapes and dtypes, all on one device.

    Note:
        For small ones: a copy of its own makes the host wait for a GPU once more, some ten microseconds each.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return split_bytes(join_bytes(tensors).cpu(), tensors)


def join_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors' bytes, (N,) uint8: wide elements first, so that each begins at a multiple of its size."""
    return torch.cat([tensors[index].reshape(-1).view(torch.uint8) for index in _by_width(tensors)])


def split_bytes(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `join_bytes` made of tensors of these shapes and dtypes, taken apart again: views."""
    parts: dict[int, Tensor] = {}
    start = 0
    for index in _by_width(like):
        tensor = like[index]
        stop = start + tensor.numel() * tensor.element_size()
        parts[index] = joined[start:stop].view(tensor.dtype).view(tensor.shape)
        start = stop
    return [parts[index] for index in range(len(like))]


def _by_width(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())
