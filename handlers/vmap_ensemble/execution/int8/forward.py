"""Turns stacked members and calibrated ranges into one vmapped forward in 8 bits, and the loop it must equal."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmap_ensemble.archive.precision import PRECISION_FILE, Precision
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.cpu.prepared import PackedGraph, PreparedForward
from vmap_ensemble.execution.cpu.schedule import Schedule, choose_schedule
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.partition import argument_positions, whole_program
from vmap_ensemble.execution.graph.values import member_slot, record_values
from vmap_ensemble.execution.int8.calibration import Batch, quantisable_head
from vmap_ensemble.execution.int8.graph import Ranges, quantise_graph
from vmap_ensemble.execution.int8.kernels import pack_quantised
from vmap_ensemble.execution.int8.steps import Layer

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers


class QuantisedForward(EnsembleForward):
    """The vmapped forward of all members with 8-bit weights and activations, on a CPU; see `PreparedForward`.

    Its members and its loop are the same 8-bit numbers in plain torch. One rounding that falls the other way is
    a step of 1/255 of a layer's range, so the two agree to `tolerance` and not to float32's rounding.

    Args:
        model: The architecture in eval mode.
        members: M stacked members, float32, on a CPU.
        ranges: From `calibration.calibrate`, for these members in this order.
        example: The model's arguments, (B, ...), of the size that is expected most often.
        schedule: How many members run at the same time; by default what is measured fastest here.

    Attributes:
        reason: One line on what was prepared.

    Raises:
        UnsupportedModel: The model can't be traced, has no convolution, or this torch or CPU lacks a kernel.
        LoadError: The members aren't float32 on a CPU, or the ranges don't belong to them.
    """

    tolerance = 5e-2
    only_mode = "int8"  # float32 would give other answers

    def __init__(
        self,
        model: nn.Module,
        members: StackedMembers,
        ranges: Ranges,
        example: Batch,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, members)
        _check_members(members)
        count = len(members.names)
        with torch.no_grad():
            lowered = lower_model(model, members)
            head = quantisable_head(lowered)
            tail = [node for node in lowered.nodes() if node not in set(head)]
            filled = quantise_graph(lowered, head, record_values(lowered, head, example), ranges, count)
            head = [node for node in lowered.nodes() if node not in set(tail)]
            plain = whole_program(lowered)
            self._run_plain, self._inputs = plain.compile(), argument_positions(lowered, plain)
            self._slots = [[member_slot(lowered, filled, name, i) for name in plain.slots] for i in range(count)]
            values = record_values(lowered, head, example, filled)
            self._run = _build(lowered, count, PackedGraph(head, tail, values, filled, ""))
            if schedule is None:
                choose_schedule([self._run], [example])
            else:
                self._run.schedule = schedule
        self.reason, self.channels_last = f"{self._run.reason}; {self._run.schedule}", self._run.channels_last

    def __call__(self, *args: Any) -> Any:
        """Run every member on the same arguments in one call; outputs (M, B, ...)."""
        return self._run(*args)

    def member(self, index: int, *args: Any) -> Any:
        """Run one member alone, in plain torch on the same 8-bit numbers: outputs (B, ...)."""
        with torch.no_grad():
            return self._run_plain(*(args[i] for i in self._inputs), *self._slots[index])

    @property
    def one_vmap(self) -> None:
        """None: model and members alone are the float32 network."""
        return None

    def part(self, start: int, stop: int) -> Any:
        """The members from `start` to `stop`, exclusive, one after another: for when memory has run out."""
        return self.loop_part(start, stop)


def _build(lowered: LoweredModel, count: int, parts: PackedGraph) -> PreparedForward:
    """The same graph on oneDNN's kernels."""
    layers = sum(isinstance(rows[0], Layer) for rows in parts.packed.values())
    reason = f"{layers} layers in 8 bits"
    try:
        packed = pack_quantised(lowered, parts.head, parts.values, parts.packed)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModel(f"quantization int8: oneDNN can't pack a layer here: {first_line(error)}") from error
    return PreparedForward(lowered, count, dataclasses.replace(parts, packed=packed, reason=reason))


def _check_members(members: StackedMembers) -> None:
    wrong = {str(tensor.dtype) for tensor in members.tensors() if tensor.is_floating_point()} - {str(torch.float32)}
    if wrong:
        raise LoadError(f"quantization int8: expected float32 members, got {', '.join(sorted(wrong))}")
    if members.device.type != "cpu":
        raise LoadError(f"quantization int8 runs on a CPU, got device {members.device}; set device: cpu")


def quantise_forward(forward: EnsembleForward, precision: Precision | None, example: Batch) -> QuantisedForward:
    """The 8-bit form of a float32 forward, with the calibration of its archive.

    Args:
        forward: Of the members, float32; it isn't used afterwards.
        precision: What the archive's precision.json says, if it has one.
        example: The model's arguments, (B, ...).

    Raises:
        LoadError: There is no calibration, it is of other members, or 8 bits can't be had.
    """
    if precision is None or not precision.ranges:
        raise LoadError(
            f"quantization int8: the archive has no calibration ({PRECISION_FILE}); build it with sample inputs: "
            "./archive.sh NAME --samples IMAGES, or the key 'samples'"
        )
    if tuple(precision.members) != forward.members.names:
        raise LoadError(
            f"{PRECISION_FILE}: calibrated for the members {', '.join(precision.members)}, the archive holds "
            f"{', '.join(forward.members.names)}; build the archive again"
        )
    return QuantisedForward(forward.model, forward.members, precision.ranges, example)
