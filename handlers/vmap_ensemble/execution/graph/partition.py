"""Turns a lowered graph into the three parts in which all members run: shared trunk, a member's own steps, tail.

arguments -> trunk, once -> own, for each member -> tail -> the model's output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from vmap_ensemble.execution.graph.lowered_model import LoweredModel, Program, extract_program
from vmap_ensemble.execution.graph.patterns import output_node


@dataclass(frozen=True)
class Partition:
    """The parts as functions; each takes what its `inputs` name: arguments, and values of the parts before it.

    Attributes:
        trunk: What is worked out once for all members.
        trunk_outputs: The values that it hands on, a tuple in this order.
        own: What each member works out with weights of its own; None if that is nothing.
        own_outputs: The values that it hands on, a tuple in this order.
        tail: What is left to the stock rules, and the nesting of the output.
        joined: Those of `trunk_outputs` that hold every member's value, (M, ...).
        has_tail_steps: Whether the tail computes anything.
        shares_steps: Whether the trunk computes a tensor.
    """

    trunk: Program
    trunk_outputs: tuple[fx.Node, ...]
    own: Program | None
    own_outputs: tuple[fx.Node, ...]
    tail: Program
    joined: tuple[fx.Node, ...]
    has_tail_steps: bool
    shares_steps: bool

    @property
    def own_dims(self) -> list[int | None]:
        """For each input of `own`: 0 where every member has its own row of it, else None."""
        return [0 if node in self.joined else None for node in self.own.inputs] if self.own else []

    @property
    def gives_members_values(self) -> bool:
        """Whether the tail only nests values that are (M, ...) before it."""
        return not self.has_tail_steps and set(self.tail.inputs) <= {*self.joined, *self.own_outputs}


def partition(
    lowered: LoweredModel,
    head: Sequence[fx.Node],
    tail: Sequence[fx.Node] = (),
    values: Mapping[fx.Node, object] | None = None,
) -> Partition:
    """Take a graph apart.

    Args:
        lowered: The graph.
        head: Its first nodes, which become trunk and own steps, in the graph's order.
        tail: The others.
        values: An example of the value of each node of the head. With it, sizes and other values that are no tensors
            are worked out anew in each part, which is cheap, and only tensors are handed on.
    """
    output = output_node(lowered.graph)
    plain = {node for node in head if values is not None and not isinstance(values[node], Tensor)}
    apart = lowered.batched - lowered.joined
    own = [node for node in head if node in apart or node in plain]
    shared = [node for node in head if node not in apart]
    tail = [*_needed_by(plain, head, [*tail, output]), *tail]
    tensors = [node for node in head if node not in plain]
    own_outputs = tuple(node for node in _used_by(tensors, [*tail, output]) if node in apart)
    trunk_outputs = tuple(node for node in _used_by(tensors, [*own, *tail, output]) if node not in apart)
    return Partition(
        trunk=extract_program(lowered, shared, trunk_outputs),
        trunk_outputs=trunk_outputs,
        own=extract_program(lowered, own, own_outputs) if own_outputs else None,
        own_outputs=own_outputs,
        tail=extract_program(lowered, tail, output.args[0]),
        joined=tuple(node for node in trunk_outputs if node in lowered.joined),
        has_tail_steps=bool(tail),
        shares_steps=any(node not in plain for node in shared),
    )


def whole_program(lowered: LoweredModel) -> Program:
    """The graph in one part: what a member computes alone."""
    return extract_program(lowered, lowered.nodes(), output_node(lowered.graph).args[0])


def argument_positions(lowered: LoweredModel, program: Program) -> list[int]:
    """Which of the model's arguments a part takes that reads nothing else."""
    arguments = lowered.arguments()
    return [arguments.index(node) for node in program.inputs]


def _used_by(nodes: Sequence[fx.Node], later: Sequence[fx.Node]) -> list[fx.Node]:
    """Which of the nodes later ones take."""
    users = set(later)
    return [node for node in nodes if users.intersection(node.users)]


def _needed_by(plain: set[fx.Node], head: Sequence[fx.Node], later: Sequence[fx.Node]) -> list[fx.Node]:
    """Which plain values later nodes take, and what those are worked out from, in the graph's order."""
    needed = set(later)
    for node in reversed(head):
        if node in plain and needed.intersection(node.users):
            needed.add(node)
    return [node for node in head if node in needed]
