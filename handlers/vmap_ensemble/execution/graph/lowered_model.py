"""The graph of one member whose weights are slots, filled member by member, and parts of it as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from vmap_ensemble.errors import LoadError


class UnsupportedModel(LoadError):
    """This preparation can't be had for the model; the text says why. Another mode still serves it."""


@dataclass(frozen=True)
class Folded:
    """A convolution's weight times its batch norm's scale, worked out when it is asked for.

    All members' together are a second copy of the stack; packed one by one they never lie beside each other.

    Attributes:
        weight: (M, out, in, kh, kw), or 1 for M where members share it; without M where they share the scale, too.
        scale: (M, out, 1, 1, 1), or without M; in the dtype that the product is rounded from.
    """

    weight: Tensor
    scale: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.weight.shape, self.scale.shape)

    def __len__(self) -> int:
        return len(self.scale)

    def whole(self) -> Tensor:
        """The product, for all members."""
        return (self.weight.to(self.scale.dtype) * self.scale).to(self.dtype)

    def row(self, index: int) -> Tensor:
        """One member's."""
        return Folded(self.weight[index if len(self.weight) > 1 else 0], self.scale[index]).whole()


@dataclass
class LoweredModel:
    """The fused graph and what fills its slots.

    Attributes:
        graph: Nodes of the model; placeholders are the model's arguments and, by name, the slots.
        root: Owner of the modules and constants that the graph still calls by name.
        slots: Slot name -> weights, (M, ...) if named in `stacked`, else (...), the same for all members. To be read
            by `value` and `row`.
        stacked: Names of the slots that differ between members.
        batched: Nodes whose value differs between members.
        joined: Nodes whose value holds all members', (M, ...), from steps that ran for all of them at once.
    """

    graph: fx.Graph
    root: nn.Module
    slots: dict[str, Tensor | Folded] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    batched: set[fx.Node] = field(default_factory=set)
    joined: set[fx.Node] = field(default_factory=set)

    def nodes(self) -> list[fx.Node]:
        """What is computed, in order: neither arguments and slots nor the output."""
        return [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]

    def value(self, name: str) -> Tensor:
        """What fills a slot, (M, ...) or (...); folded weights stay in this form."""
        value = self.slots[name]
        if isinstance(value, Folded):
            value = self.slots[name] = value.whole()
        return value

    def row(self, name: str, index: int) -> Tensor:
        """What fills a slot for one member, (...)."""
        value = self.slots[name]
        if name not in self.stacked:
            return self.value(name)
        return value.row(index) if isinstance(value, Folded) else value[index]

    def add_slot(self, name: str, value: Tensor | Folded, stacked: bool) -> fx.Node:
        """A new slot before all nodes.

        Args:
            name: What to call its node, which may get a number.
            value: (M, ...) if stacked, else (...).
            stacked: Whether it differs between members.
        """
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        self.slots[node.name] = value.detach() if isinstance(value, Tensor) else value
        if stacked:
            self.stacked.add(node.name)
            self.batched.add(node)
        return node

    def arguments(self) -> list[fx.Node]:
        """The model's own arguments, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.slots]


def slot_name(key: str) -> str:
    """What the slot for a member's tensor is called."""
    return "slot_" + key.replace(".", "_")


def replace_node(node: fx.Node, new: Any) -> None:
    """Hand on another value instead of the node's, and erase it."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def drop_unused_slots(lowered: LoweredModel) -> None:
    """Forget the slots that no node takes any more."""
    for node in list(lowered.graph.nodes):
        if node.name in lowered.slots and not node.users:
            lowered.slots.pop(node.name)
            lowered.stacked.discard(node.name)
            lowered.batched.discard(node)
            lowered.graph.erase_node(node)


def join_slots(lowered: LoweredModel, parts: Sequence[fx.Node]) -> fx.Node:
    """A new slot for the tensors of some, one below the other; (M, ...) if a member has one of them for itself."""
    tensors = [lowered.value(part.name) for part in parts]
    own = [part.name in lowered.stacked for part in parts]
    if any(own):
        count = len(tensors[own.index(True)])
        tensors = [t if mine else t.expand(count, *t.shape) for t, mine in zip(tensors, own, strict=True)]
    joined = torch.cat(tensors, dim=1 if any(own) else 0)
    return lowered.add_slot(slot_name(f"{parts[0].name}_joined"), joined, any(own))


def mark_batched(lowered: LoweredModel) -> None:
    """Find the nodes whose value differs between members: those that a stacked slot reaches."""
    for node in lowered.graph.nodes:
        if node.name in lowered.stacked or any(parent in lowered.batched for parent in node.all_input_nodes):
            lowered.batched.add(node)


def extract_program(lowered: LoweredModel, nodes: Iterable[fx.Node], outputs: Any) -> Program:
    """A callable made of some of the graph's nodes.

    Args:
        lowered: The graph they are from.
        nodes: The nodes to compute, in the graph's order.
        outputs: What to return: nodes in any nesting of tuples, lists and dicts.

    Returns:
        The program; what its nodes take from outside are its inputs and slots, by name.
    """
    graph, copies, inside = fx.Graph(), {}, list(nodes)
    wanted: list[fx.Node] = [parent for node in inside for parent in node.all_input_nodes]
    fx.map_arg(outputs, wanted.append)
    outer = list(dict.fromkeys(node for node in wanted if node not in set(inside)))
    outer.sort(key=lambda node: node.name in lowered.slots)
    for node in outer:
        copies[node] = graph.placeholder(node.name)
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(fx.map_arg(outputs, lambda n: copies[n]))
    inputs = tuple(node for node in outer if node.name not in lowered.slots)
    slots = tuple(node.name for node in outer if node.name in lowered.slots)
    return Program(graph, lowered.root, inputs, slots)


@dataclass
class Program:
    """A part of the graph as a function: run(*inputs, *slots)."""

    graph: fx.Graph
    root: nn.Module
    inputs: tuple[fx.Node, ...]
    slots: tuple[str, ...]

    def compile(self) -> Callable[..., Any]:
        """The program as generated Python, which has no interpreter between two steps."""
        return fx.GraphModule(self.root, self.graph).forward
