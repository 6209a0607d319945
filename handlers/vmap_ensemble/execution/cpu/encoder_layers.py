"""Turns members' encoder layers into one block of memory each, and rows of tokens into those behind all layers.

The kernel is kernels/encoder.cpp: every member, layer, product and attention of a batch in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.execution.cpu.kernel_library import load_library

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
MOST = 127.0  # of a number in 8 bits, symmetric
_Sizes = ctypes.c_int64 * 9


@dataclass(frozen=True)
class LayerForm:
    """What all layers of an encoder have in common.

    Attributes:
        hidden: Width of a row.
        inner: Width between the two matrices of the feed-forward step.
        heads: Heads of the attention.
        activation: Behind the first of them, one of `ACTIVATIONS`.
        epsilon: Of the layer norms.
        scale: Of the attention's scores.
    """

    hidden: int
    inner: int
    heads: int
    activation: str
    epsilon: float
    scale: float

    def reasons_against(self) -> list[str]:
        """Why the kernel doesn't take such layers; empty if it does."""
        library = load_library()
        if library is None:
            return ["no kernel here"]
        panel, reasons = library.encoder_panel(), []
        if self.hidden % panel or self.inner % panel:
            reasons.append(f"widths {self.hidden} and {self.inner} aren't multiples of {panel}")
        if self.hidden % self.heads or self.hidden // self.heads > library.encoder_widest_head():
            reasons.append(f"{self.heads} heads on a width of {self.hidden}")
        if self.activation not in ACTIVATIONS:
            reasons.append(f"activation {self.activation}")
        return reasons


@dataclass(frozen=True)
class LayerTensors:
    """A layer's weights, (M, ...) or, where members share them, (1, ...); matrices (M, out, in) as nn.Linear's.

    Attributes:
        joined, joined_bias: Query, key and value below each other.
        out, out_bias: Behind the attention.
        norm, norm_bias: Behind its sum.
        up, up_bias, down, down_bias: Of the feed-forward step.
        last_norm, last_norm_bias: Behind its sum.
    """

    joined: Tensor
    joined_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    last_norm: Tensor
    last_norm_bias: Tensor

    def in_order(self) -> tuple[Tensor, ...]:
        """As the kernel reads them."""
        return tuple(vars(self).values())


class PackedLayers:
    """Consecutive layers of M members, or of all members at once where they share them.

    Args:
        form: What the layers have in common, without `LayerForm.reasons_against`.
        layers: Their float32 tensors, in order; all of one M.
        int8: Multiply in 8 bits: weights rounded here, one scale per output, and rows when they come, one per row,
            both symmetric. Sums, biases, norms, softmax and activations stay float32.
    """

    def __init__(self, form: LayerForm, layers: Sequence[LayerTensors], *, int8: bool = False) -> None:
        self.form, self.count, self.int8 = form, len(layers), int8
        tensors = [tensor for layer in layers for tensor in layer.in_order()]
        self.members = len(tensors[0])
        self.weights = torch.empty(self.members, sum(_floats(tensor[0], int8) for tensor in tensors))
        for index, own in enumerate(self.weights):
            _pack([tensor[index] for tensor in tensors], own, int8)

    def run(
        self, x: Tensor, starts: Tensor, lengths: Tensor, *, first_only: bool = False, at_a_time: int = 1
    ) -> Tensor:
        """Run all layers.

        Args:
            x: (M, T, H) rows, float32 on the CPU; or (1, T, H), the same for all members. Layers that members
                share take any M.
            starts: (B,) int64, each text's first row.
            lengths: (B,) int64, its number of rows, at least one; together they are all rows.
            first_only: Return each text's first row alone, for which the last layer does less.
            at_a_time: Members at the same time, each on its share of torch's threads.

        Returns:
            (M, T, H), or (M, B, H).

        Raises:
            RuntimeError: Another shape or dtype than expected, or no memory.
        """
        self._check(x)
        x, starts, lengths = x.contiguous(), starts.contiguous(), lengths.contiguous()
        form, rows, texts, members = self.form, x.shape[1], len(starts), max(len(x), self.members)
        y = x.new_empty(members, texts if first_only else rows, form.hidden)
        strides = [tensor.stride(0) if len(tensor) > 1 else 0 for tensor in (self.weights, x)]
        sizes = _Sizes(members, self.count, form.hidden, form.inner, form.heads, rows, texts, *strides)
        done = load_library().encoder_run(  # type: ignore[union-attr]
            *(sizes, self.weights.data_ptr(), x.data_ptr(), starts.data_ptr(), lengths.data_ptr(), y.data_ptr()),
            *(self.int8, ACTIVATIONS[form.activation], first_only, form.epsilon, form.scale),
            *(at_a_time, torch.get_num_threads()),
        )
        if not done:
            raise RuntimeError("can't allocate memory for the rows of an encoder")
        return y

    def _check(self, x: Tensor) -> None:
        """Refuse rows that the kernel would read beyond."""
        members = self.members if self.members > 1 else len(x)
        if x.dtype != torch.float32 or x.dim() != 3 or len(x) not in (1, members) or x.shape[2] != self.form.hidden:
            expected = f"float32 ({members}, T, {self.form.hidden})"
            raise RuntimeError(f"encoder layers: expected {expected}, got {x.dtype} {tuple(x.shape)}")


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., out, in) float32 -> int8 of the same shape, -127 to 127, and (..., out) what one step of an output is."""
    steps = weight.abs().amax(-1) / MOST
    safe = steps.where(steps > 0, 1.0)
    return (weight / safe.unsqueeze(-1)).round().to(torch.int8), steps


def round_rows(x: Tensor) -> Tensor:
    """(..., in) float32 as the kernel rounds rows to 8 bits, in plain torch."""
    highest = x.abs().amax(-1, keepdim=True)
    return (x * (MOST / highest).where(highest > 0, 0.0)).round() * (highest / MOST)


def _floats(tensor: Tensor, int8: bool) -> int:
    """The memory of one member's packed tensor."""
    if not int8 or tensor.dim() == 1:
        return tensor.numel()
    return int(load_library().encoder_int8_floats(*tensor.shape))  # type: ignore[union-attr]


def _pack(tensors: Sequence[Tensor], to: Tensor, int8: bool) -> None:
    """One member's tensors, matrices in the kernel's order, one behind the other."""
    library: Any = load_library()
    at = 0
    for tensor in tensors:
        place = to[at : at + _floats(tensor, int8)]
        if tensor.dim() == 1:
            place.copy_(tensor)
        elif int8:
            rounded, steps = round_weight(tensor)
            library.encoder_pack_int8(rounded.data_ptr(), steps.data_ptr(), place.data_ptr(), *tensor.shape)
        else:
            matrix = tensor.contiguous()
            library.encoder_pack(matrix.data_ptr(), place.data_ptr(), *matrix.shape)
        at += len(place)
