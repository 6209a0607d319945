"""Turns a lowered graph into facts about its values: their shapes, who uses them, where members part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel
from vmap_ensemble.execution.graph.patterns import LinearCall
from vmap_ensemble.execution.graph.steps import CONVOLUTIONS, MIN_LINEAR_WEIGHTS


def find_cut(lowered: LoweredModel, nodes: list[fx.Node]) -> int:
    """Up to which node the network belongs to the operator that spreads members over the cores.

    All of it, if members have convolutions of their own: a linear layer behind them is measured faster on the
    core where its member's convolutions ran than as one batched product over all members, for which the cores
    wait for one another. If they lie side by side in the channels, up to the last large linear layer: one product
    per member on packed weights is faster than a batched one on plain weights. If only heads behind a shared trunk
    differ, the trunk alone, and the stock rules make batched products of the heads.
    """
    convolutions = [index for index, node in enumerate(nodes) if node.target in CONVOLUTIONS]
    if any(nodes[index] in lowered.batched for index in convolutions):
        return len(nodes)
    ends = [index for index, node in enumerate(nodes) if node in lowered.joined]
    if ends:
        ends += [index for index, node in enumerate(nodes) if is_large_linear(lowered, node)]
    return max([*convolutions, *ends]) + 1


def record_values(
    lowered: LoweredModel,
    nodes: list[fx.Node],
    example: Sequence[Tensor],
    filled: Mapping[str, list[Any]] | None = None,
    index: int = 0,
) -> dict[fx.Node, Any]:
    """Run one member's plain graph once, to learn every value's kind and shape; the first member's by default.

    Args:
        lowered: The graph.
        nodes: Those of the graph to run.
        example: The model's arguments.
        filled: What fills slots that are no plain tensors, per member.
        index: The member.

    Raises:
        UnsupportedModel: The example doesn't go through the model.
    """
    values: dict[fx.Node, Any] = dict(zip(lowered.arguments(), example, strict=False))
    for node in lowered.graph.nodes:
        if node.name in lowered.slots:
            values[node] = member_slot(lowered, filled or {}, node.name, index)
    interpreter = fx.Interpreter(lowered.root, graph=lowered.graph)
    interpreter.env = values
    for node in nodes:
        try:
            value = interpreter.run_node(node)
            values[node] = value[index] if node in lowered.joined else value
        except Exception as error:
            raise UnsupportedModel(f"the example doesn't fit the model at its step '{node.name}': {error}") from error
    return values


def is_large_linear(lowered: LoweredModel, node: fx.Node) -> bool:
    """Whether the node is a linear layer that is worth oneDNN's packed weights."""
    call = LinearCall.of(node, lowered)
    weight = None if call is None else lowered.slots[call.weight.name]
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return math.prod(weight.shape[-2:]) >= MIN_LINEAR_WEIGHTS


def is_consumable(
    lowered: LoweredModel,
    node: fx.Node,
    operands: Sequence[Any],
    fresh: Sequence[Any],
    order: dict[fx.Node, int],
    values: Mapping[fx.Node, Any],
) -> bool:
    """Whether the sum may overwrite the residual: one of `fresh` made it, and nothing reads it any more.

    What members share is read by the next member, too.
    """
    x, other = operands
    made_here = other.target in fresh and (other in lowered.batched) == (node in lowered.batched)
    last_use = all(order[user] <= order[node] for user in other.users)
    return made_here and last_use and other is not x and values[other].shape == values[node].shape


def member_slot(lowered: LoweredModel, packed: Mapping[str, list[Any]], name: str, index: int) -> Any:
    """What fills a slot when the member of this index runs alone."""
    if name in packed:
        return packed[name][index if name in lowered.stacked else 0]
    return lowered.row(name, index)
