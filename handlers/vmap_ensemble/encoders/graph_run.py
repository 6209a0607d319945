"""Runs a traced encoder's graph on oneDNN's packed weights, member by member, on a core each where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx

from vmap_ensemble.encoders.trace import linear_joined
from vmap_ensemble.execution.cpu.layers import add_packed_slot, write_step
from vmap_ensemble.execution.cpu.onednn import linear_add_step, linear_step
from vmap_ensemble.execution.cpu.prepared import PackedGraph, PreparedForward
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, drop_unused_slots, join_slots
from vmap_ensemble.execution.graph.steps import MIN_LINEAR_WEIGHTS, linear, linear_add

PackWeight = Callable[[Tensor], list[Tensor]]


class GraphRun:
    """All steps as operators of a graph: for encoders whose layers the kernel doesn't take.

    Args:
        lowered: The traced graph, which is changed.
        members: M.
        pack_weight: (M, out, in) or (out, in) weights -> packed ones, one per member, or one in all.
    """

    what = "a graph, member by member"

    def __init__(self, lowered: LoweredModel, members: int, pack_weight: PackWeight) -> None:
        packed = pack_layers(lowered, pack_weight)
        values = {node: node.meta["val"] for node in lowered.nodes()}
        parts = PackedGraph(lowered.nodes(), [], values, packed, f"{len(packed)} linear layers on packed weights")
        self._run = PreparedForward(lowered, members, parts)

    def __call__(self, arguments: Sequence[Tensor], at_a_time: int) -> list[Any]:
        """What `graph_arguments` gives, and members at a time -> the model's outputs, each (M, ...)."""
        self._run.schedule = Schedule(joint=False, at_a_time=at_a_time)
        return self._run(*arguments)


def pack_layers(lowered: LoweredModel, pack_weight: PackWeight) -> dict[str, list[Any]]:
    """Put the linear layers on packed weights, in place.

    Args:
        lowered: The traced graph.
        pack_weight: (M, out, in) or (out, in) weights -> packed ones, one per member, or one in all.

    Returns:
        Slot name -> packed weights, one per member, or one in all if members share them.
    """
    packed: dict[str, list[Any]] = {}
    for node in lowered.nodes():
        if node.target is linear_joined:
            _pack_joined(lowered, node, packed, pack_weight)
        elif node.target in (linear, linear_add):
            _pack_one(lowered, node, packed, pack_weight)
    drop_unused_slots(lowered)
    return packed


def _pack_one(lowered: LoweredModel, node: fx.Node, packed: dict[str, list[Any]], pack_weight: PackWeight) -> None:
    args: Any = node.args
    weight = args[1] if node.target is linear else args[2]
    tensor = lowered.value(weight.name)
    is_plain = node.target is linear and args[3] == "none"
    if is_plain and tensor.shape[-2:].numel() < MIN_LINEAR_WEIGHTS:
        write_step(node, (F.linear, args[:3]))
        return
    slot = add_packed_slot(lowered, weight)
    packed[slot.name] = pack_weight(tensor)
    if node.target is linear:
        x, _, bias, activation = args
        write_step(node, linear_step(x, slot, bias, activation))
    else:
        x, other, _, bias = args
        write_step(node, linear_add_step(x, other, slot, bias))


def _pack_joined(lowered: LoweredModel, node: fx.Node, packed: dict[str, list[Any]], pack_weight: PackWeight) -> None:
    x, weights, biases = cast(tuple[Any, ...], node.args)
    weight = join_slots(lowered, weights)
    packed[weight.name] = pack_weight(lowered.value(weight.name))
    lowered.slots[weight.name] = packed[weight.name][0]  # the plain copy gives its memory back
    bias = None if biases is None else join_slots(lowered, biases)
    write_step(node, linear_step(x, weight, bias, "none"))
