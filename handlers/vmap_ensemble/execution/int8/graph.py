"""Turns a lowered graph and the ranges of its values into a graph of 8-bit steps, one set of scales per member.

Values stay 8-bit from convolution to convolution, max pooling and reshaping included. What has no 8-bit form
here (averages, concatenations, gates, small linear layers, softmax) runs in float32 between two conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.graph.lowered_model import (
    LoweredModel,
    UnsupportedModel,
    drop_unused_slots,
    mark_batched,
    replace_node,
)
from vmap_ensemble.execution.graph.patterns import ConvolveCall, LinearCall, MaxPool, only_reshapes
from vmap_ensemble.execution.graph.steps import MIN_LINEAR_WEIGHTS, convolve, convolve_add
from vmap_ensemble.execution.int8.steps import (
    Layer,
    Scale,
    convolve_add_u8,
    convolve_u8,
    dequantise,
    linear_u8,
    max_pool_u8,
    quantise,
    quantise_weight,
    scale_of_range,
)

# Name of a value -> (lowest, highest) per member, or once where all members share the value.
Ranges = Mapping[str, Sequence[Sequence[float]]]


# Float step -> its 8-bit form.
_STEPS: dict[Any, Callable[..., Tensor]] = {
    convolve: convolve_u8,
    convolve_add: convolve_add_u8,
    F.linear: linear_u8,
}


def find_layers(lowered: LoweredModel, nodes: list[fx.Node], values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The nodes that get an 8-bit form: convolutions, and linear layers that are large enough.

    Raises:
        UnsupportedModel: They hold less than half of the weights, as in a transformer: 8 bits would gain nothing.
    """
    layers = [node for node in nodes if _is_layer(lowered, node, values)]
    sizes = {
        name: lowered.row(name, 0).numel() for name, value in lowered.slots.items() if value.dtype.is_floating_point
    }
    names = {call.weight.name for call in (_call_of(lowered, node) for node in layers) if call is not None}
    in_8_bits = sum(sizes[name] for name in names)
    in_float = sum(size for name, size in sizes.items() if name not in names and size >= MIN_LINEAR_WEIGHTS)
    if in_8_bits <= in_float:
        raise UnsupportedModel(
            f"quantization int8: only {len(layers)} layers with {in_8_bits} weights of this architecture have an "
            f"8-bit form, {in_float} weights would stay float32; see docs/precision.md"
        )
    return layers


def _call_of(lowered: LoweredModel, node: fx.Node) -> ConvolveCall | LinearCall | None:
    return ConvolveCall.of(node) or LinearCall.of(node, lowered)


def _is_layer(lowered: LoweredModel, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    call = _call_of(lowered, node)
    if isinstance(call, ConvolveCall):
        if call.other is None:
            return True
        other = values.get(call.other)
        return isinstance(other, Tensor) and other.shape == values[node].shape
    if call is None or call.joined or not call.has_plain_bias(lowered) or values[node].dim() != 2:
        return False
    return lowered.value(call.weight.name).shape[-2:].numel() >= MIN_LINEAR_WEIGHTS


def name_values(lowered: LoweredModel, layers: list[fx.Node]) -> dict[fx.Node, str]:
    """Names for the values whose ranges must be known: what layers read, and what convolutions give.

    A convolution's value is called after its weights, so that ranges can't be taken for another layer's when a
    library numbers its nodes otherwise.
    """
    names: dict[fx.Node, str] = {}
    for node in layers:
        call = ConvolveCall.of(node)
        read = node.args[:1] if call is None else (call.x, call.other, node)
        for value in read:
            if isinstance(value, fx.Node) and value not in names:
                name = _name(value)
                names[value] = name if name not in names.values() else f"{name} ({value.name})"
    return names


def _name(value: fx.Node) -> str:
    call = ConvolveCall.of(value)
    if call is None:
        return value.name
    return str(call.weight).removeprefix("slot_").removesuffix("_folded").removesuffix("_weight")


def quantise_graph(
    lowered: LoweredModel, nodes: list[fx.Node], values: Mapping[fx.Node, Any], ranges: Ranges, count: int
) -> dict[str, list[Any]]:
    """Replace layers by their 8-bit steps, in place.

    Args:
        lowered: The graph; float32.
        nodes: Those of the graph to look at.
        values: An example of every node's value.
        ranges: Of the values that `name_values` names, from calibration.
        count: M.

    Returns:
        Slot name -> what fills it: `Layer` or `Scale`, one per member, or one in all where the value is shared.

    Raises:
        LoadError: A range is missing, or isn't that of this many members.
    """
    layers = find_layers(lowered, nodes, values)
    pass_ = _Quantiser(lowered, name_values(lowered, layers), ranges, count)
    for node in nodes:
        if node in layers:
            pass_.replace_layer(node)
        else:
            pass_.carry(node)
    pass_.join_float_users()
    drop_unused_slots(lowered)
    mark_batched(lowered)
    lowered.graph.lint()
    return {name: rows for name, rows in pass_.filled.items() if name in lowered.slots}


class _Quantiser:
    """One pass over the graph. `u8` holds, per float node, its 8-bit twin; `scales` how that is read."""

    def __init__(self, lowered: LoweredModel, names: dict[fx.Node, str], ranges: Ranges, count: int) -> None:
        self.lowered, self.graph, self.count = lowered, lowered.graph, count
        self.names, self.ranges = names, ranges
        self.u8: dict[fx.Node, fx.Node] = {}
        self.scales: dict[fx.Node, list[Scale]] = {}
        self.inserted: set[fx.Node] = set()
        self.filled: dict[str, list[Any]] = {}

    def replace_layer(self, node: fx.Node) -> None:
        call = _call_of(self.lowered, node)
        if call is None:
            raise TypeError(f"'{node}': expected a convolution or a linear layer, got {node.target}")
        other, output = None, None
        rest: tuple[Any, ...] = ()  # a linear layer gives float32
        if isinstance(call, ConvolveCall):
            other, output, rest = call.other, self._scales_of(node), ([*call.settings], call.activation)
        inputs = [self._twin(value, node) for value in (call.x, other) if value is not None]
        rows = self._layers(node, call, other, output)
        slot = self._slot(f"{call.weight}_int8", rows, node in self.lowered.batched)
        with self.graph.inserting_before(node):
            new = self.graph.call_function(_STEPS[node.target], (*inputs, slot, *rest))
        if output is None:
            replace_node(node, new)
        else:
            self.u8[node], self.scales[node] = new, output

    def carry(self, node: fx.Node) -> None:
        """Let a step that only moves or compares numbers work on the 8-bit twin of what it reads."""
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or x not in self.u8 or x in self.inserted:
            return
        pooling = MaxPool.of(node, self.lowered.root)
        with self.graph.inserting_before(node):
            if pooling is not None:
                new = self.graph.call_function(max_pool_u8, (self.u8[x], [*pooling]))
            elif only_reshapes(node, self.lowered.root):
                new = self.graph.node_copy(node, lambda n: self.u8[n] if n is x else n)
            else:
                return
        self.u8[node], self.scales[node] = new, self.scales[x]

    def join_float_users(self) -> None:
        """What still reads a float node reads its twin, brought back to float32."""
        for node in reversed(self.u8):
            if node in self.inserted:
                continue  # a float value of its own, which was quantised for a layer
            twin = self.u8[node]
            if node.users:
                scale = self._slot(f"{node.name}_scale", self.scales[node], node in self.lowered.batched)
                with self.graph.inserting_after(twin):
                    node.replace_all_uses_with(self.graph.call_function(dequantise, (twin, scale)))
            self.graph.erase_node(node)

    def _twin(self, value: fx.Node, layer: fx.Node) -> fx.Node:
        """The 8-bit form of what a layer reads; a float value is quantised in front of the first that does."""
        if value not in self.u8:
            rows = self._scales_of(value)
            scale = self._slot(f"{value.name}_scale", rows, value in self.lowered.batched)
            with self.graph.inserting_before(layer):
                self.u8[value] = self.graph.call_function(quantise, (value, scale))
            self.scales[value] = rows
            self.inserted.add(value)
        return self.u8[value]

    def _scales_of(self, value: fx.Node) -> list[Scale]:
        """One scale per member, or one in all where they share the value."""
        name, wanted = self.names[value], self.count if value in self.lowered.batched else 1
        rows = self.ranges.get(name)
        if rows is None or len(rows) != wanted:
            got = "none" if rows is None else str(len(rows))
            raise LoadError(
                f"calibration: expected {wanted} ranges of '{name}', got {got}; they were made for another network "
                "or another version of torchvision: build the archive again, with --samples"
            )
        return [scale_of_range(*row) for row in rows]

    def _layers(
        self, node: fx.Node, call: ConvolveCall | LinearCall, other: fx.Node | None, output: list[Scale] | None
    ) -> list[Layer]:
        def row(rows: list[Any] | None, index: int) -> Any:
            return None if rows is None else rows[index] if len(rows) > 1 else rows[0]

        layers = []
        for index in range(self.count if node in self.lowered.batched else 1):
            quantised, scale = quantise_weight(self.lowered.row(call.weight.name, index))
            residual = row(None if other is None else self.scales[other], index)
            offset = None if call.bias is None else self.lowered.row(call.bias.name, index).clone()
            into = row(self.scales[call.x], index)
            layers.append(Layer(quantised, scale, offset, into, row(output, index), residual))
        return layers

    def _slot(self, name: str, rows: list[Any], stacked: bool) -> fx.Node:
        """A placeholder that is filled with one object per member instead of a tensor."""
        # Something must stand there for the graph's bookkeeping; `filled` is what the members get.
        node = self.lowered.add_slot(name, torch.empty(0), stacked)
        self.filled[node.name] = rows
        return node
