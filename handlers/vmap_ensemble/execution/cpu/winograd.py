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

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.kernel_library import instruction_set, load_library
from vmap_ensemble.execution.cpu.layers import ConvolutionKernel, ConvolutionLayer
from vmap_ensemble.execution.cpu.onednn import Step
from vmap_ensemble.execution.graph.patterns import ConvolveCall

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
            raise ValueError("expected a library of the kernels, got none here; ask `reasons_against` before")
        rows, channels = weight.shape[:2]
        filters, weight = rows // groups, weight.contiguous()
        values = torch.empty(groups, (tile + 2) ** 2 * channels * filters)
        for group, packed in enumerate(values):
            own = weight[group * filters : (group + 1) * filters]
            library.winograd_pack(tile, own.data_ptr(), packed.data_ptr(), filters, channels)
        return cls(values, tile, groups, channels, filters)


def reasons_against(layer: ConvolutionLayer) -> list[str]:
    """Why a convolution isn't computed in tiles on this CPU; empty if it is."""
    target, (padding, stride, dilation, groups) = instruction_set(), layer.settings
    rows, channels, *sides = layer.shape
    known = {
        "not 3x3": sides == [3, 3],
        "strided": set(stride) == {1},
        "dilated": set(dilation) == {1},
        "negatively padded": min(padding) >= 0,
        f"with {layer.activation}": layer.activation in ACTIVATIONS,
        str(layer.dtype).removeprefix("torch."): layer.dtype == torch.float32,
        "not of a batch": len(layer.output) == 4,
        "unequal sum": not layer.unequal_sum,
    }
    reasons = [reason for reason, holds in known.items() if not holds]
    if target is None:
        return [*reasons, "no kernel here"]
    if channels % target.lanes or (rows // groups) % target.lanes:
        reasons.append(f"no multiple of {target.lanes} channels")
    if not reasons and fastest_tile(layer) is None:
        reasons.append("little gained")
    # Asked for where it would serve alone: the answer may take a compiler, and a warning that there is none.
    if not reasons and load_library() is None:
        reasons.append("no kernel here")
    return reasons


def fastest_tile(layer: ConvolutionLayer) -> int | None:
    """The side of the tiles that cost the least, 2 or 4; None if the direct convolution is about as fast."""
    rows, channels, *_ = layer.shape
    filters = rows // layer.settings.groups
    batch, _, height, width = layer.output
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


class Winograd(ConvolutionKernel):
    """3x3 convolutions in tiles, with a residual, relu and halving by maxima."""

    name = "winograd"
    fresh, halves = (convolve_tiles,), True

    def reasons_against(self, layer: ConvolutionLayer) -> list[str]:
        return reasons_against(layer)

    def pack(self, layer: ConvolutionLayer, weight: Tensor) -> WinogradWeights:
        tile = fastest_tile(layer)
        if tile is None:
            raise ValueError("expected a convolution that is worth it, got another; ask `reasons_against` before")
        return WinogradWeights.of(weight, tile, layer.settings.groups)

    def step(
        self, layer: ConvolutionLayer, call: ConvolveCall, packed: fx.Node, *, in_place: bool, halved: bool
    ) -> Step:
        padding, activation = call.settings.padding, call.activation
        return convolve_tiles, (call.x, call.other, packed, call.bias, padding, activation, in_place, halved)
