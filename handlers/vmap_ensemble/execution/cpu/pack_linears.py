"""Turns the large linear layers of a lowered graph into products on weights packed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.onednn import LINEAR, prepack
from vmap_ensemble.execution.cpu.pack_convolutions import _add_packed_slot
from vmap_ensemble.execution.cpu.single_row import RowMatrices
from vmap_ensemble.execution.graph.fusing import swallow
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import activation_name
from vmap_ensemble.execution.graph.steps import multiply_members
from vmap_ensemble.execution.graph.values import is_large_linear

# Up to how many bytes a joined linear layer's weights are packed once more, for batches of one.
MAX_SECOND_COPY = 2**28


def pack_linears(lowered: LoweredModel, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> dict[str, list[Any]]:
    """Replace large linear layers by oneDNN's, in place; arguments and result as of convolutions.

    A relu behind one becomes part of it, and leaves `nodes`. A layer of all members gets theirs as `JoinedMatrices`.
    """

    def is_relu(user: fx.Node) -> str | None:
        return "relu" if activation_name(user, lowered.root) == "relu" else None

    packed: dict[str, list[Any]] = {}
    for node in list(nodes):
        if not is_large_linear(lowered, node):
            continue
        x, weight, bias = cast(Any, node.args)
        joined, tensor = node.target is multiply_members, lowered.value(weight.name)
        if values[x].dim() != (3 if joined else 2):
            continue
        slot = _add_packed_slot(lowered, weight)
        packed[slot.name] = [JoinedMatrices.of(tensor)] if joined else prepack(tensor)
        activation = swallow(node, is_relu, nodes) or "none"
        node.target = multiply_packed if joined else LINEAR
        node.args = (x, slot, bias, activation) if joined else (x, slot, bias, activation, [], "")
        if joined and not weight.users:
            lowered.slots[slot.name] = lowered.slots[weight.name] = tensor.new_empty(0)
    return packed


@dataclass(frozen=True)
class JoinedMatrices:
    """Every member's matrix of a linear layer, for many rows and for one.

    Attributes:
        each: M matrices, (out, in), in oneDNN's order, for calls per member.
        rows: All of them for single rows, in one call; None where there is no kernel for it, or a second copy would
            take too much memory.
    """

    each: list[Tensor]
    rows: RowMatrices | None

    @classmethod
    def of(cls, weight: Tensor) -> JoinedMatrices:
        """From plain ones, (M, out, in)."""
        return cls(prepack(weight), RowMatrices.of(weight) if weight.nbytes <= MAX_SECOND_COPY else None)


def multiply_packed(x: Tensor, weights: JoinedMatrices, bias: Tensor | None, activation: str) -> Tensor:
    """Every member's linear layer on packed weights: (M, B, in) -> (M, B, out)."""
    count, rows, _ = x.shape
    if rows == 1 and weights.rows is not None:
        return weights.rows.multiply(x, bias, activation)
    biases = [None] * count if bias is None else bias
    parts = zip(x, weights.each, biases, strict=True)
    return torch.stack([LINEAR(row, weight, own, activation, [], "") for row, weight, own in parts])
