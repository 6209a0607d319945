"""Triton's kernels for few rows of each member: a linear layer with what follows it, and a layer norm.

With few rows a product is as fast as its weights are read. A program computes all rows of a member for some of the
outputs, so each weight is read once, and a residual or an activation costs no launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
_LEAST_ROWS = 16  # of a tile that tl.dot takes


@dataclass(frozen=True)
class Tile:
    """How much a program of the product reads at a time.

    Attributes:
        outputs: Columns of the result that a program computes.
        inputs: How many of a row's numbers each step of its loop reads.
        warps, stages: As Triton knows them.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int


# Narrow tiles make enough programs for all of a GPU's multiprocessors where a member is alone; deep ones keep enough
# reads in flight. Which of them is fastest is measured for each layer (few_rows.py).
TILES = (Tile(16, 128, 4, 4), Tile(32, 128, 4, 4), Tile(64, 64, 4, 5))


def block_of(rows: int) -> int:
    """Rows of the tile for so many: a power of two."""
    return max(_LEAST_ROWS, triton.next_power_of_2(rows))


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, tile: Tile
) -> Tensor:
    """Every member's linear layer, then its residual, then its activation; summed in float32.

    Args:
        x: (M, R, in), R at most `MOST_ROWS`; a row's numbers lie side by side.
        weight: (M, out, in), of x's dtype; likewise.
        bias: (M, out) or None.
        other: The residual, (M, R, out), or None.
        activation: One of `LINEAR_ACTIVATIONS` of execution/graph/steps.py.
        tile: See `Tile`.

    Returns:
        (M, R, out) of x's dtype.
    """
    members, rows, inputs = x.shape
    outputs = weight.shape[1]
    out = torch.empty(members, rows, outputs, dtype=x.dtype, device=x.device)
    _multiply[(triton.cdiv(outputs, tile.outputs), members)](
        x, weight, weight if bias is None else bias, x if other is None else other, out,
        rows, outputs, inputs, x.stride(0), x.stride(1), weight.stride(0), weight.stride(1),
        0 if bias is None else bias.stride(0), *((0, 0) if other is None else other.stride()[:2]),
        HAS_BIAS=bias is not None, HAS_OTHER=other is not None, ACTIVATION=activation,
        ROWS=block_of(rows), OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Every member's layer norm over the last axis, in float32.

    Args:
        x: (M, R, H); a row's numbers lie side by side.
        weight, bias: (M, H); likewise.
        eps: Added to the variance.

    Returns:
        (M, R, H) of x's dtype.
    """
    members, rows, width = x.shape
    out = torch.empty(members, rows, width, dtype=x.dtype, device=x.device)
    _normalise[(rows, members)](
        x, weight, bias, out, rows, width, x.stride(0), x.stride(1), weight.stride(0), bias.stride(0), eps,
        WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x, weight, bias, other, out, rows, outputs, inputs,
    x_member, x_row, w_member, w_row, b_member, o_member, o_row,
    HAS_BIAS: tl.constexpr, HAS_OTHER: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_tile = x + member * x_member + row[:, None] * x_row
    w_tile = weight + member * w_member + column[None, :].to(tl.int64) * w_row
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        place = start + tl.arange(0, INPUTS)
        left = tl.load(x_tile + place[None, :], mask=(row < rows)[:, None] & (place < inputs)[None, :], other=0.0)
        right = tl.load(
            w_tile + place[:, None], mask=(column < outputs)[None, :] & (place < inputs)[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + member * b_member + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    if HAS_OTHER:
        places = member * o_member + row[:, None] * o_row + column[None, :]
        total += tl.load(other + places, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        total = tl.maximum(total, 0.0)
    if ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        total = total * tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    places = (member * rows + row[:, None]) * outputs + column[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _normalise(
    x, weight, bias, out, rows, width, x_member, x_row, w_member, b_member, eps, WIDTH: tl.constexpr
):  # fmt: skip
    row, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    values = tl.load(x + member * x_member + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    own_weight = tl.load(weight + member * w_member + place, mask=inside, other=0.0).to(tl.float32)
    own_bias = tl.load(bias + member * b_member + place, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale * own_weight + own_bias
    tl.store(out + (member * rows + row) * width + place, result.to(out.dtype.element_ty), mask=inside)
