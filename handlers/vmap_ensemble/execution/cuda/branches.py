"""Turns members into branches: what they share once, then each one's own forward, all side by side in one recording.

No vmap: a member runs the kernels that it would run alone, convolutions ungrouped and with their batch norm folded,
and what one member leaves idle of the device another one takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.execution.cuda.recorder import Recorder
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, Program, UnsupportedModel, extract_program
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.patterns import output_node

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Members:
    """A forward taken apart.

    Attributes:
        share: Arguments (B, ...) -> whatever the members' own parts take, worked out once.
        step: That, and one of `states` -> a member's outputs (B, ...).
        states: What a member has for itself, one each.
    """

    share: Callable[..., Any]
    step: Callable[[Any, Any], Any]
    states: Sequence[Any]

    def compiled(self) -> Members:
        """The same with the members' own part compiled: once for all, since the state is an argument of it."""
        return replace(self, step=torch.compile(self.step, dynamic=False))


class Branches:
    """The members' own forwards side by side: arguments (B, ...) -> outputs (M, B, ...).

    Args:
        members: What runs.
        recorder: Runs works beside each other.
    """

    def __init__(self, members: Members, recorder: Recorder) -> None:
        self.members, self.recorder = members, recorder

    def __call__(self, *args: Any) -> Any:
        """Run every member on the same arguments."""
        shared, step = self.members.share(*args), self.members.step
        outputs = self.recorder.side_by_side([partial(step, shared, state) for state in self.members.states])
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)


def take_apart(forward: Forward, channels_last: bool = False) -> Members:
    """Fold and part a forward as far as torch.fx can look into it; else each member is one whole.

    Args:
        forward: Of the members, whose tensors stay as they are; folded ones are copies.
        channels_last: Lay convolutions' weights out in this memory format, in which they then compute.
    """
    plain = forward.one_vmap
    count = len(forward.members.names)
    if plain is None:  # the forward knows what it does beside its model
        return Members(lambda *args: args, lambda args, index: forward.member(index, *args), range(count))
    try:
        return _fold(lower_model(plain.model, plain.members), count, channels_last)
    except UnsupportedModel as error:
        logger.info("branches are whole members: %s", error)
    model, states = plain.model, [plain.member_state(index) for index in range(count)]
    return Members(lambda *args: args, lambda args, state: functional_call(model, state, args), states)


def _fold(lowered: LoweredModel, count: int, channels_last: bool) -> Members:
    nodes = lowered.nodes()
    own = extract_program(lowered, [n for n in nodes if n in lowered.batched], output_node(lowered.graph).args[0])
    handed = tuple(node for node in own.inputs if node.op != "placeholder")
    trunk = extract_program(lowered, [node for node in nodes if node not in lowered.batched], handed)
    arguments = [node.name for node in lowered.arguments()]
    run_trunk, run_own = _by_name(trunk), _by_name(own)
    kept = {name: _lay(lowered.value(name), channels_last) for name in trunk.slots}
    common = {name: _lay(lowered.value(name), channels_last) for name in own.slots if name not in lowered.stacked}
    stacked = [name for name in own.slots if name in lowered.stacked]

    def share(*args: Any) -> dict[str, Any]:
        values = dict(zip(arguments, args, strict=False))
        return {**values, **dict(zip((node.name for node in handed), run_trunk(values, kept), strict=True))}

    states = [
        {**common, **{name: _lay(lowered.row(name, index), channels_last) for name in stacked}}
        for index in range(count)
    ]
    return Members(share, run_own, states)


def _by_name(program: Program) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]:
    """The program on values and slots by name."""
    run, inputs, slots = program.compile(), [node.name for node in program.inputs], program.slots
    return lambda values, tensors: run(*(values[name] for name in inputs), *(tensors[name] for name in slots))


def _lay(tensor: Tensor, channels_last: bool) -> Tensor:
    """A weight in its memory format; what isn't a 2-d convolution's stays as it is."""
    images = channels_last and tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if images else tensor
