"""Turns 3x3 convolutions of stride 1 into Winograd's products of tiles, on weights transformed once.

A tile of 2x2 pixels takes 16 multiplications a channel instead of 36, one of 4x4 pixels 36 instead of 144; oneDNN's
direct convolution, at the CPU's limit already, can't be faster than that. The kernel is kernels/winograd.cpp.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.execution.cpu.kernel_library import instruction_set, load_library

TILES = (2, 4)
ACTIVATIONS = ("none", "relu")
# What a layer costs besides its multiplications, in multiplications: a value that goes into or comes out of them, and
# a weight, which no core finds in its own cache. Measured on 5 layers, batches of 1 and 8, AVX-512: 10 % off at most
# but where activations of several MB go through the cache.
_VALUE_COST, _WEIGHT_COST = 16, 12
# The weights' copy is 1.8 or 4 times the direct convolution's. Below this gain that isn't worth it: ResNet-18's last
# three layers would be 1.1 to 1.3 times as fast, and take as much memory as all the others together.
_WORTH = 1.25
_Sizes = ctypes.c_int64 * 8


@dataclass(frozen=True)
class WinogradWeights:
    """A convolution's weights as the products take them.

    Attributes:
        values: float32, flat, in the kernel's order: for each group and point, panels of filters.
        tile: Side of the squares of pixels that are computed at once.
        groups: G.
        channels: Input channels of a group.
        filters: Output channels of a group.
    """

    values: Tensor
    tile: int
    groups: int
    channels: int
    filters: int

    @classmethod
    def of(cls, weight: Tensor, tile: int, groups: int) -> WinogradWeights:
        """From plain ones, (groups * filters, channels, 3, 3) in float32."""
        library = load_library()
        if library is None:
            raise ValueError("expected a library of the kernels, got none on this machine; ask `choose_tile` before")
        rows, channels = weight.shape[:2]
        filters, weight = rows // groups, weight.contiguous()
        values = torch.empty(groups, (tile + 2) ** 2 * channels * filters)
        for group, packed in enumerate(values):
            own = weight[group * filters : (group + 1) * filters]
            library.winograd_pack(tile, own.data_ptr(), packed.data_ptr(), filters, channels)
        return cls(values, tile, groups, channels, filters)


def choose_tile(
    dtype: torch.dtype, shape: Sequence[int], settings: Sequence[Any], activation: str, output: Sequence[int]
) -> int | None:
    """The side of the tiles in which a convolution is computed the fastest on this CPU.

    Args:
        dtype: Of the weight.
        shape: The weight's, (groups * filters, channels, height, width).
        settings: Padding, stride, dilation and groups.
        activation: Its name.
        output: The output's shape, (B, groups * filters, H, W).

    Returns:
        2 or 4; None if the direct convolution is about as fast, or there is no kernel for it.
    """
    (padding, stride, dilation, groups), target = settings, instruction_set()
    rows, channels, *sides = shape
    filters = rows // groups
    plain = [*sides, *stride, *dilation] == [3, 3, 1, 1, 1, 1] and activation in ACTIVATIONS and min(padding) >= 0
    if target is None or not plain or dtype != torch.float32 or len(output) != 4:
        return None
    if channels % target.lanes or filters % target.lanes or load_library() is None:
        return None
    batch, _, height, width = output
    direct_cost = 9 * filters * channels * (batch * height * width + _WEIGHT_COST)
    costs = {}
    for tile in TILES:
        tiles = batch * math.ceil(height / tile) * math.ceil(width / tile)
        products = tiles * filters * channels + _VALUE_COST * tiles * (filters + channels)
        costs[tile] = (tile + 2) ** 2 * (products + _WEIGHT_COST * filters * channels)
    best = min(TILES, key=lambda tile: costs[tile])
    return best if _WORTH * costs[best] < direct_cost else None


def convolve_tiles(
    x: Tensor,
    other: Tensor | None,
    weights: WinogradWeights,
    bias: Tensor | None,
    padding: Sequence[int],
    activation: str,
    in_place: bool,
    halved: bool,
) -> Tensor:
    """A convolution, a residual sum, relu and max pooling in one pass; each tensor float32.

    Args:
        x: (B, groups * channels, H, W), channels_last or it is copied.
        other: The residual, of the output's shape or expanded to it; None adds none.
        weights: See there.
        bias: (groups * filters,).
        padding: Rows and columns of zeros on each side.
        activation: One of `ACTIVATIONS`.
        in_place: Write into `other`.
        halved: Give the maxima of squares of 2x2 pixels; without a residual.

    Returns:
        (B, groups * filters, H + 2 * rows - 2, W + 2 * columns - 2), or half of the sides; channels_last.

    Raises:
        RuntimeError: Another dtype, other channels than the weights', an image smaller than the kernel, a residual
            that doesn't expand to the output's shape, or no memory.
    """
    batch, channels, height, width = x.shape
    sides = (height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    if channels != weights.groups * weights.channels or min(sides) < 1 or x.dtype != torch.float32:
        expected = f"float32 (B, {weights.groups * weights.channels}, H, W) of at least 3x3 with its padding"
        got = f"{x.dtype} {tuple(x.shape)} padded by {tuple(padding)}"
        raise RuntimeError(f"convolution: expected {expected}, got {got}")
    shape = (batch, weights.groups * weights.filters, *(side // 2 if halved else side for side in sides))
    x = x.contiguous(memory_format=torch.channels_last)
    if other is not None:
        other = other.to(torch.float32).expand(shape).contiguous(memory_format=torch.channels_last)
    y = other if in_place and other is not None else torch.empty(shape, memory_format=torch.channels_last)
    sizes = _Sizes(batch, height, width, weights.groups, weights.channels, weights.filters, *padding)
    done = load_library().winograd_convolve(  # type: ignore[union-attr]
        *(weights.tile, x.data_ptr(), weights.values.data_ptr(), None if bias is None else bias.data_ptr()),
        *(None if other is None else other.data_ptr(), y.data_ptr(), sizes),
        *(activation == "relu", halved, torch.get_num_threads()),
    )
    if not done:
        raise RuntimeError("can't allocate memory for the tiles of a convolution")
    return y
