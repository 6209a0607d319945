"""Turns the large linear layers of a lowered graph into products on weights packed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.layers import LinearKernel, LinearLayer, Tally, add_packed_slot, write_step
from vmap_ensemble.execution.cpu.onednn import Step, linear_step, multiply, prepack
from vmap_ensemble.execution.cpu.single_row import RowMatrices, reasons_against
from vmap_ensemble.execution.graph.fusing import swallow
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import LinearCall, activation_name
from vmap_ensemble.execution.graph.values import is_large_linear

# Up to how many bytes a joined linear layer's weights are packed once more, for batches of one.
MAX_SECOND_COPY = 2**28


class OneDnnLinear(LinearKernel):
    """oneDNN's products on reordered matrices: one member's, or every member's, where single rows have a kernel."""

    name = "onednn"
    activations = ("relu",)

    def reasons_against(self, layer: LinearLayer) -> list[str]:
        """A small layer costs more to call oneDNN for than it saves."""
        reasons = [] if layer.large else ["small"]
        if len(layer.input) != len(layer.shape):
            reasons.append("not of rows")
        return reasons

    def pack(self, layer: LinearLayer, weight: Tensor) -> list[Any]:
        return [JoinedMatrices.of(weight)] if layer.joined else prepack(weight)

    def step(self, layer: LinearLayer, call: LinearCall, packed: fx.Node, activation: str) -> Step:
        if layer.joined:
            return multiply_packed, (call.x, packed, call.bias, activation)
        return linear_step(call.x, packed, call.bias, activation)


# Asked in this order. Another kernel is put where it belongs: LINEAR_KERNELS.insert(0, Mine()).
LINEAR_KERNELS: list[LinearKernel] = [OneDnnLinear()]


def pack_linears(
    lowered: LoweredModel, nodes: list[fx.Node], values: dict[fx.Node, Any]
) -> tuple[dict[str, list[Any]], Tally]:
    """Replace large linear layers by faster ones, in place; arguments and result as of `pack_convolutions`.

    An activation behind one that its kernel knows becomes part of it, and leaves `nodes`.
    """
    packed: dict[str, list[Any]] = {}
    tally = Tally()
    for node in list(nodes):
        call = LinearCall.of(node, lowered)
        if call is None:
            continue
        layer = describe_layer(lowered, node, call, values)
        kernel = next((k for k in LINEAR_KERNELS if tally.note(k.name, k.reasons_against(layer))), None)
        if kernel is None:
            continue
        slot, weight = add_packed_slot(lowered, call.weight), lowered.value(call.weight.name)
        rows = packed[slot.name] = kernel.pack(layer, weight)
        if isinstance(rows[0], JoinedMatrices):
            tally.note("single rows", rows[0].reasons)
        activation = swallow(node, _known_to(kernel, lowered), nodes) or "none"
        write_step(node, kernel.step(layer, call, slot, activation))
        if layer.joined and not call.weight.users:
            lowered.slots[slot.name] = lowered.slots[call.weight.name] = weight.new_empty(0)
    return packed, tally


def describe_layer(lowered: LoweredModel, node: fx.Node, call: LinearCall, values: dict[fx.Node, Any]) -> LinearLayer:
    """What kernels are asked about, from the example's values."""
    plain = lowered.slots[call.weight.name]
    own = call.weight.name in lowered.stacked and not call.joined
    shape = plain.shape[1:] if own else plain.shape
    return LinearLayer(plain.dtype, shape, call.joined, values[call.x].shape, is_large_linear(lowered, node))


def _known_to(kernel: LinearKernel, lowered: LoweredModel) -> Callable[[fx.Node], str | None]:
    def name_of(user: fx.Node) -> str | None:
        name = activation_name(user, lowered.root)
        return name if name in kernel.activations else None

    return name_of


@dataclass(frozen=True)
class JoinedMatrices:
    """Every member's matrix of a linear layer, for many rows and for one.

    Attributes:
        each: M matrices, (out, in), in oneDNN's order, for calls per member.
        rows: All of them for single rows, in one call; None if anything is against it.
        reasons: What is.
    """

    each: list[Tensor]
    rows: RowMatrices | None
    reasons: list[str]

    @classmethod
    def of(cls, weight: Tensor) -> JoinedMatrices:
        """From plain ones, (M, out, in)."""
        too_large = weight.nbytes > MAX_SECOND_COPY
        reasons = ["too large for a second copy"] if too_large else reasons_against(weight)
        return cls(prepack(weight), None if reasons else RowMatrices.of(weight), reasons)


def multiply_packed(x: Tensor, weights: JoinedMatrices, bias: Tensor | None, activation: str) -> Tensor:
    """Every member's linear layer on packed weights: (M, B, in) -> (M, B, out)."""
    count, rows, _ = x.shape
    if rows == 1 and weights.rows is not None:
        return weights.rows.multiply(x, bias, activation)
    biases = [None] * count if bias is None else bias
    parts = zip(x, weights.each, biases, strict=True)
    return torch.stack([multiply(row, weight, own, activation) for row, weight, own in parts])
