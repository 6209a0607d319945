"""Turns members and sample inputs into the ranges of their activations, from which 8-bit scales are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.patterns import count_convolutions
from vmap_ensemble.execution.graph.values import find_cut, member_slot, record_values
from vmap_ensemble.execution.int8.graph import find_layers, name_values

Batch = tuple[Tensor, ...]


def calibrate(model: nn.Module, members: StackedMembers, batches: Iterable[Batch]) -> dict[str, list[list[float]]]:
    """Run every member on samples, and record the range of each value that will be 8 bits wide.

    Args:
        model: The architecture in eval mode.
        members: M stacked members, float32, on a CPU.
        batches: The model's arguments, (B, ...); at least one.

    Returns:
        Value -> [lowest, highest] per member, or once where all members share the value.

    Raises:
        UnsupportedModel: The model can't be traced, or has nothing to run in 8 bits.
        LoadError: There are no samples.
    """
    batches = list(batches)
    if not batches:
        raise LoadError("calibration: expected at least one sample input, got none")
    with torch.no_grad():
        lowered = lower_model(model, members)
        head = quantisable_head(lowered)
        values = record_values(lowered, head, batches[0])
        names = name_values(lowered, find_layers(lowered, head, values))
        recorders = [_Recorder(lowered, head, names, index).record(batches) for index in range(len(members.names))]
    # What all members share is the same in each of them.
    return {
        name: [recorder.ranges[name] for recorder in (recorders if node in lowered.batched else recorders[:1])]
        for node, name in names.items()
    }


def quantisable_head(lowered: LoweredModel) -> list[fx.Node]:
    """The nodes among which 8-bit steps are looked for.

    Raises:
        UnsupportedModel: There is no convolution.
    """
    nodes = lowered.nodes()
    if not count_convolutions(nodes):
        raise UnsupportedModel(
            "quantization: the model has no 2-d convolution that torch.fx can see; see docs/limits.md"
        )
    return nodes[: find_cut(lowered, nodes)]


class _Recorder(fx.Interpreter):
    """Runs one member's float32 graph, and keeps the range of each named value as it is computed."""

    def __init__(self, lowered: LoweredModel, nodes: list[fx.Node], names: Mapping[fx.Node, str], index: int) -> None:
        super().__init__(lowered.root, graph=lowered.graph)
        self.lowered, self.nodes, self.names = lowered, nodes, names
        slots = [node for node in lowered.graph.nodes if node.name in lowered.slots]
        self.slots = {node: member_slot(lowered, {}, node.name, index) for node in slots}
        self.ranges: dict[str, list[float]] = {}

    def record(self, batches: Sequence[Batch]) -> _Recorder:
        for batch in batches:
            self.env = {**self.slots, **dict(zip(self.lowered.arguments(), batch, strict=False))}
            for node, value in self.env.items():
                self._keep(node, value)
            for node in self.nodes:
                # At once: an in-place step may overwrite the value later.
                self.env[node] = self.run_node(node)
                self._keep(node, self.env[node])
        return self

    def _keep(self, node: fx.Node, value: Tensor) -> None:
        name = self.names.get(node)
        if name is None:
            return
        low, high = (bound.item() for bound in torch.aminmax(value))
        before = self.ranges.get(name, [low, high])
        self.ranges[name] = [min(low, before[0]), max(high, before[1])]
