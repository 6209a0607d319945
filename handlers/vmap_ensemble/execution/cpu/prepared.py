"""Runs a lowered graph on packed weights for all members: what they share once, their own steps by batching rules.

The rules are applied at load: members in one call of each step, or one by one as one custom operator with a vmap
rule, spread over the cores. Steps without a rule, such as heads on a shared trunk, run under torch.func.vmap's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.utils import _pytree as pytree

from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, Program
from vmap_ensemble.execution.graph.partition import argument_positions, partition
from vmap_ensemble.execution.graph.values import member_slot

Result = TypeVar("Result")


@dataclass(frozen=True)
class PackedGraph:
    """A lowered graph whose first nodes run on packed weights.

    Attributes:
        head: Nodes for the operator that spreads the members over the cores, in the graph's order.
        tail: The others, which run under the stock rules.
        values: An example of the value of each node of the head.
        packed: Slot name -> what fills it, one per member, or one in all if members share it.
        reason: One line on what was prepared.
    """

    head: list[fx.Node]
    tail: list[fx.Node]
    values: dict[fx.Node, Any]
    packed: dict[str, list[Any]]
    reason: str


class PreparedForward:
    """The prepared forward of all members.

    The vmapped forward with its batching rules applied at load: for members side by side in the channels one rule per
    step, for members on their own one rule for all of their steps. torch.func.vmap is called for the steps that no
    rule is known for, once; where there are none its dispatch, 0.3 ms a call, is spared.

    Args:
        lowered: The graph.
        count: M.
        parts: What of it runs on packed weights.
        joint: Whether the members lie side by side in the channels (`join_members`).

    Attributes:
        schedule: How many members run at the same time; to be set before the first call.
        channels_last: Whether images are wanted in this memory format; others are copied into it.
        shares_steps: Whether something is worked out once for all members.
        reason: One line on what was prepared.
    """

    def __init__(self, lowered: LoweredModel, count: int, parts: PackedGraph, joint: bool = False) -> None:
        self._parts = divided = partition(lowered, parts.head, parts.tail, parts.values)
        packed, own = parts.packed, divided.own
        self._body = None if own is None else _Body(lowered, own, packed, count)
        self._arguments = lowered.arguments()
        self._run_trunk, self._run_tail = divided.trunk.compile(), divided.tail.compile()
        self._trunk_inputs = argument_positions(lowered, divided.trunk)
        self._trunk_slots = [
            packed[name][0] if name in packed else lowered.value(name) for name in divided.trunk.slots
        ]
        self._tail_slots = [lowered.value(name) for name in divided.tail.slots]
        self._tail_dims = tuple(0 if name in lowered.stacked else None for name in divided.tail.slots)
        self._body_dims, self._leaves_steps = divided.own_dims, not divided.gives_members_values
        device = next(iter(lowered.slots.values())).device
        self._index = torch.arange(count, device=device)
        self.channels_last = bool(parts.head) or device.type == "cuda"
        self.reason, self.shares_steps = parts.reason, divided.shares_steps
        self._schedule = Schedule(joint, count if joint else 1)

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if schedule.joint != self._schedule.joint or (schedule.joint and schedule != self._schedule):
            raise ValueError(f"expected another number of members at a time than {self._schedule}, got {schedule}")
        if self._body and not schedule.joint:
            self._body.use_groups(schedule.at_a_time)
        self._schedule = schedule

    def schedules(self) -> list[Schedule]:
        """What is worth a measurement."""
        if self._schedule.joint or self._body is None:
            return [self._schedule]
        threads, count = torch.get_num_threads(), len(self._index)
        return [Schedule(False, n) for n in sorted({1, 2, 4, 8, threads}) if n == 1 or n <= min(count, threads)]

    @property
    def runs_members(self) -> bool:
        """Whether there are steps that members run one by one."""
        return self._body is not None

    def keep_schedule(self) -> None:
        """Stay with the schedule in use: the threads of others end."""
        if self._body:
            self._body.drop_other_groups()

    def __call__(self, *args: Tensor) -> Any:
        """Run every member on the same arguments.

        Args:
            args: The model's arguments, (B, ...), shared by all members.

        Returns:
            The model's output structure; each tensor (M, B, ...), member-major.
        """
        with torch.no_grad():
            env = self._begin(args)
            if not self._leaves_steps:
                if self._body:
                    outputs = self._body.run_all(self._body.inputs_of(env), self._body_dims)
                    env.update(zip(self._parts.own_outputs, outputs, strict=True))
                return self._run_tail(*(env[node] for node in self._parts.tail.inputs))
            joined = [env[node] for node in self._parts.joined]
            in_dims = (0, *[0] * len(joined), *self._tail_dims)
            return vmap(partial(self._member, env), in_dims=in_dims)(self._index, *joined, *self._tail_slots)

    def _begin(self, args: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
        """Arguments and what is worked out for all members at once."""
        if self.channels_last and not all(map(_is_channels_last, args)):
            args = self._in_body(lambda: tuple(_to_channels_last(arg) for arg in args))
        trunk = self._run_trunk(*[args[index] for index in self._trunk_inputs], *self._trunk_slots)
        env = dict(zip(self._arguments, args, strict=False))
        env.update(zip(self._parts.trunk_outputs, trunk, strict=True))
        return env

    def _in_body(self, job: Callable[[], Result]) -> Result:
        """Run a job where the members run: OpenMP's threads of this one would go on spinning beside theirs."""
        return self._body.threads.call(job) if self._body else job()

    def _member(self, env: dict[fx.Node, Any], index: Tensor, *values: Tensor) -> Any:
        joined, slots = values[: len(self._parts.joined)], values[len(self._parts.joined) :]
        env = {**env, **dict(zip(self._parts.joined, joined, strict=True))}
        if self._body:
            outputs = torch.ops.vmap_ensemble.run_member(self._body.handle, index, self._body.inputs_of(env))
            env.update(zip(self._parts.own_outputs, outputs, strict=True))
        return self._run_tail(*(env[node] for node in self._parts.tail.inputs), *slots)


class JoinedBlocks:
    """Some members side by side at a time: each block's values stay in the cache from layer to layer.

    Args:
        blocks: The forwards of as many members each, in the members' order.
    """

    def __init__(self, blocks: list[PreparedForward]) -> None:
        self.blocks = blocks
        self.reason, self.channels_last, self.schedule = blocks[0].reason, True, blocks[0].schedule

    def schedules(self) -> list[Schedule]:
        """The one that the blocks were built for."""
        return [self.schedule]

    def keep_schedule(self) -> None:
        """There is no other."""

    def __call__(self, *args: Tensor) -> Any:
        """Run every member on the same arguments, (B, ...) each; outputs as of `PreparedForward`."""
        outputs = [block(*args) for block in self.blocks]
        return pytree.tree_map(lambda *rows: torch.cat(rows), *outputs)


Prepared = PreparedForward | JoinedBlocks


class _Body:
    """The part of the network that runs member by member, as far as the operator goes."""

    def __init__(
        self,
        lowered: LoweredModel,
        program: Program,
        packed: dict[str, list[Any]],
        count: int,
    ) -> None:
        self.program, self.run = program, program.compile()
        self.slots = [
            [member_slot(lowered, packed, name, index) for name in self.program.slots] for index in range(count)
        ]
        self._pools: dict[int, MemberThreads] = {}
        self.use_groups(1)
        self.handle = next(_handles)
        _bodies[self.handle] = self

    def use_groups(self, groups: int) -> None:
        if groups not in self._pools:
            self._pools[groups] = MemberThreads(groups)
        self.threads = self._pools[groups]

    def drop_other_groups(self) -> None:
        for pool in self._pools.values():
            if pool is not self.threads:
                pool.close()
        self._pools = {self.threads.groups: self.threads}

    def inputs_of(self, env: dict[fx.Node, Any]) -> list[Tensor]:
        """What the members' steps take of the values that are there."""
        return [env[node] for node in self.program.inputs]

    def run_all(self, inputs: list[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        """Every member's outputs, each (M, ...), from inputs that they share or, where `dims` says so, have each."""

        def run(index: int) -> Any:
            own = [x if dim is None else x.select(dim, index) for x, dim in zip(inputs, dims, strict=True)]
            return self.run(*own, *self.slots[index])

        rows = self.threads.map(run, range(len(self.slots)))
        return [torch.stack(column) for column in zip(*rows, strict=True)]


_handles = itertools.count()
_bodies: WeakValueDictionary[int, _Body] = WeakValueDictionary()

# Registered at import: a name is defined once in a process, and there are no members that it would depend on.
# Packed weights are opaque to torch.stack, so the operator takes a handle of them and the member's index.
_library = torch.library.Library("vmap_ensemble", "FRAGMENT")
_library.define("run_member(int body, Tensor member, Tensor[] inputs) -> Tensor[]")


def _run_member(body: int, member: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    program = _bodies[body]
    return list(program.run(*inputs, *program.slots[int(member)]))


def _run_members(info: Any, in_dims: Any, body: int, member: Tensor, inputs: list[Tensor]) -> Any:
    """The vmap rule: all members in one go, in the order of the index (which `__call__` makes 0..M-1)."""
    outputs = _bodies[body].run_all(inputs, in_dims[2])
    return outputs, [0] * len(outputs)


_library.impl("run_member", _run_member, "CompositeExplicitAutograd")
torch.library.register_vmap("vmap_ensemble::run_member", _run_members, lib=_library)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
