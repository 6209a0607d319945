"""Turns a traced encoder's layers into one call of the kernel for all members; what is around them stays a graph.

arguments -> front: each member's embeddings -> layers, all members in one call -> back: each member's head
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vmap_ensemble.encoders.graph_run import PackWeight, pack_layers
from vmap_ensemble.encoders.layers import FoundLayers
from vmap_ensemble.execution.cpu.encoder_layers import PackedLayers
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, Program, drop_unused_slots, extract_program
from vmap_ensemble.execution.graph.patterns import output_node
from vmap_ensemble.execution.graph.values import member_slot


class NativeRun:
    """An encoder whose layers are the kernel's.

    Args:
        lowered: The traced graph, which is changed.
        members: M.
        pack_weight: (M, out, in) or (out, in) weights -> packed ones, one per member, or one in all.
        found: Its layers, whose form the kernel takes.
        int8: Multiply in 8 bits; see `PackedLayers`.
    """

    what = "all layers in one call"

    def __init__(
        self, lowered: LoweredModel, members: int, pack_weight: PackWeight, found: FoundLayers, *, int8: bool = False
    ) -> None:
        groups = itertools.groupby(found.layers, key=lambda layer: layer.is_own(lowered))
        self._layers = [
            PackedLayers(found.form, [layer.tensors(lowered) for layer in layers], int8=int8) for _, layers in groups
        ]
        self._first_only = found.first_only
        begin = found.layers[0].rows
        end, outputs = _take_out(lowered, found)
        packed = pack_layers(lowered, pack_weight)
        self._front = _Part(lowered, begin, packed, members if begin in lowered.batched else 1, end)
        self._back = _Part(lowered, outputs, packed, members, end)

    def __call__(self, arguments: Sequence[Tensor], at_a_time: int) -> list[Any]:
        """What `graph_arguments` gives, and members at a time -> the model's outputs, each (M, ...)."""
        *_, first, mask, _table = arguments
        lengths = mask.sum(1)
        (rows,) = self._front.run(arguments)
        rows = rows.flatten(0, 1)
        for layers in self._layers:
            first_only = self._first_only and layers is self._layers[-1]
            rows = layers.run(rows, first, lengths, first_only=first_only, at_a_time=at_a_time)
        return self._back.run(arguments, rows if self._first_only else rows.unsqueeze(1))


class _Part:
    """Nodes of the graph that members run one after another.

    Args:
        lowered: The graph.
        outputs: Nodes whose values are wanted, or one.
        packed: Slot name -> what fills it, one per member, or one in all.
        members: How many run it: 1 where all would give the same.
        middle: The node for what comes out of the layers; the graph's one argument that isn't the model's.
    """

    def __init__(
        self, lowered: LoweredModel, outputs: Any, packed: dict[str, list[Any]], members: int, middle: fx.Node
    ) -> None:
        wanted = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        self._program = _program_for(lowered, wanted)
        self._call = self._program.compile()
        arguments = [node for node in lowered.arguments() if node is not middle]
        self._places = [None if node is middle else arguments.index(node) for node in self._program.inputs]
        self._slots = [
            [member_slot(lowered, packed, name, index) for name in self._program.slots] for index in range(members)
        ]

    def run(self, arguments: Sequence[Tensor], middle: Tensor | None = None) -> list[Tensor]:
        """The graph's arguments, and `middle` of each member or one for all -> outputs, each (members, ...)."""
        rows = []
        for index, slots in enumerate(self._slots):
            own = None if middle is None else middle[index % len(middle)]
            rows.append(self._call(*(own if place is None else arguments[place] for place in self._places), *slots))
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def _take_out(lowered: LoweredModel, found: FoundLayers) -> tuple[fx.Node, Any]:
    """Replace the layers by one more argument of the graph; it, and the model's outputs."""
    graph, begin = lowered.graph, found.layers[0].rows
    output = output_node(graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        end = graph.placeholder("behind_layers")
    end.meta = dict(found.result.meta)
    if found.layers[-1].end in lowered.batched:
        lowered.batched.add(end)
    found.result.replace_all_uses_with(end)
    outputs = output.args[0]
    output.args = ((begin, outputs),)  # or what the layers were fed with would be dead, too
    graph.eliminate_dead_code()
    drop_unused_slots(lowered)
    return end, outputs


def _program_for(lowered: LoweredModel, outputs: Sequence[fx.Node]) -> Program:
    """What gives these nodes, of all that the graph computes."""
    needed = set(outputs)
    for node in reversed(lowered.nodes()):
        if node in needed:
            needed.update(node.all_input_nodes)
    return extract_program(lowered, [node for node in lowered.nodes() if node in needed], list(outputs))
