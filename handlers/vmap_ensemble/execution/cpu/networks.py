"""Turns a convolutional network and its stacked members into a vmapped forward that beats the loop.

A vmapped convolution is a grouped convolution, which stock vmap runs slower than the loop on a CPU. Here the
member's graph is lowered (folded batch norm, fused relu and residual) and its batching rules are applied at load:
members in one call of each step, or one by one as one custom operator with a vmap rule, on oneDNN's prepacked
weights either way, whichever is measured faster. What all members share runs once, and steps without a rule, such
as heads on a shared trunk, run under torch.func.vmap's stock rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.onednn import reasons_against_dtypes
from vmap_ensemble.execution.cpu.pack_convolutions import pack_convolutions
from vmap_ensemble.execution.cpu.pack_linears import pack_linears
from vmap_ensemble.execution.cpu.pooling import replace_pools
from vmap_ensemble.execution.cpu.prepared import JoinedBlocks, PackedGraph, Prepared, PreparedForward
from vmap_ensemble.execution.cpu.schedule import Schedule, choose_schedule
from vmap_ensemble.execution.graph.joining import join_members
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.patterns import count_convolutions
from vmap_ensemble.execution.graph.values import find_cut, record_values
from vmap_ensemble.execution.timing import Budget

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers

TOLERANCE = 1e-5  # of float32: ten times tighter than the proof at load, which is for every mode


def pack_graph(lowered: LoweredModel, cut: int, example: Sequence[Tensor]) -> PackedGraph:
    """Put the convolutions among the first `cut` nodes on packed weights."""
    nodes = lowered.nodes()
    head, tail = nodes[:cut], nodes[cut:]
    values = record_values(lowered, head, example)
    convolutions = count_convolutions(nodes)
    replace_pools(lowered.root, head)
    packed, convolved = pack_convolutions(lowered, head, values)
    linears, multiplied = pack_linears(lowered, head, values)
    reason = f"{convolutions} convolutions fused, {len(packed)} of them on prepacked weights"
    if head and convolved.against:
        reason += f" [{convolved}]"
    if linears:
        reason += f", and {len(linears)} linear layers [{multiplied}]"
    return PackedGraph(head, tail, values, {**packed, **linears}, reason)


def prepare(
    model: nn.Module,
    members: StackedMembers,
    *example: Tensor,
    packed: bool | None = None,
    schedule: Schedule | None = None,
    tolerance: float | None = None,
) -> Prepared:
    """Prepare the fastest vmapped forward known here for a convolutional network.

    Args:
        model: The architecture in eval mode. Its own tensors are dropped, as `EnsembleForward` does.
        members: M stacked members: float32, or half precision where `reasons_against_dtypes` has none.
        example: The forward's arguments, (B, ...), of the size that is expected most often. Other batch and
            image sizes give right results too.
        packed: Run on oneDNN's prepacked weights; by default wherever the members are on a CPU.
        schedule: In which order the members are computed on a CPU; by default what is measured fastest here.
        tolerance: Largest difference to the members' own forward, relative to the output's largest value; by
            default 1e-5 in float32, and what the proof at load allows in half precision.

    Returns:
        A callable: arguments of the model -> its outputs, each (M, B, ...).

    Raises:
        UnsupportedModel: The model has no convolution, can't be traced, has weights in a dtype that is no
            faster here, can't be run in the schedule, or doesn't keep the tolerance on the example.
        LoadError: The members don't fill the model, or it is in training mode.

    Note:
        Holds its own, folded and packed, copy of every convolution's weights.
    """
    forward = build_prepared(model, members, [example], packed, schedule)
    _check_equal(forward, EnsembleForward(model, members), example, tolerance)
    return forward


def build_prepared(
    model: nn.Module,
    members: StackedMembers,
    examples: Sequence[tuple[Tensor, ...]],
    packed: bool | None = None,
    schedule: Schedule | None = None,
    budget: Budget | None = None,
    count: int | None = None,
) -> Prepared:
    """As `prepare`, but not compared with the members' own forwards: the caller does.

    Args:
        model: As for `prepare`.
        members: As for `prepare`.
        examples: Argument tuples of the sizes that will be served; the weights are packed for the first.
        packed: As for `prepare`.
        schedule: As for `prepare`.
        budget: Of the start, of which measuring schedules takes a share.
        count: Members that will be served, where these are some of them.

    Raises:
        UnsupportedModel: The model has no convolution, can't be traced, isn't of a fast dtype, or can't be run in
            the schedule.
        LoadError: The members don't fill the model, or it is in training mode.
    """
    reasons = reasons_against_dtypes(members)
    if reasons:
        raise UnsupportedModel("; ".join(reasons))
    with torch.no_grad():
        whole = EnsembleForward(model, members)  # checks that the members fill the model, and drops its own tensors
        if schedule is None:
            turns = partial(growth, members=len(members.names), count=count)
            forward = choose_schedule(_candidates(whole, examples[0], packed), examples, budget, turns)
        else:
            forward = _build(whole, examples[0], packed, schedule.at_a_time if schedule.joint else 0)
            forward.schedule = schedule
            forward.keep_schedule()
        forward.reason += f"; {forward.schedule}"
        return forward


def growth(schedule: Schedule, members: int, count: int | None) -> float:
    """How much longer a call takes for `count` members than for so many, in this schedule."""
    return schedule.turns(count or members) / schedule.turns(members)


def _candidates(whole: EnsembleForward, example: tuple[Tensor, ...], packed: bool | None) -> Iterable[Prepared]:
    """Members apart, all in one call, and some in one call, as far as the model can be run so."""
    apart = _build_all(whole, example, packed, joint=False)
    if len(whole.members.names) == 1 or not apart.runs_members:
        return [apart]
    return _apart_or_joined(apart, whole, example, packed)


def _apart_or_joined(
    apart: PreparedForward, whole: EnsembleForward, example: tuple[Tensor, ...], packed: bool | None
) -> Iterator[Prepared]:
    count = len(whole.members.names)
    yield apart
    some = [size for size in (4, 3, 2) if size < count and count % size == 0][:1]
    sizes = [count] if apart.shares_steps else [count, *some]
    del apart  # if it wasn't the fastest so far, its memory is needed now
    with suppress(UnsupportedModel):  # a step that can't be joined: there are no other ways
        for size in sizes:
            yield _build(whole, example, packed, size)


def _build(whole: EnsembleForward, example: tuple[Tensor, ...], packed: bool | None, in_one_call: int) -> Prepared:
    """The forward with so many members in one call of each step; 0 leaves them apart."""
    count = len(whole.members.names)
    if not 0 < in_one_call < count:
        return _build_all(whole, example, packed, joint=bool(in_one_call))
    parts = [whole.part(start, min(start + in_one_call, count)) for start in range(0, count, in_one_call)]
    return JoinedBlocks([_build_all(part, example, packed, joint=True) for part in parts])


def _build_all(
    whole: EnsembleForward, example: tuple[Tensor, ...], packed: bool | None, *, joint: bool
) -> PreparedForward:
    model, members = whole.model, whole.members
    lowered, count = lower_model(model, members), len(members.names)
    if not count_convolutions(lowered.nodes()):
        raise UnsupportedModel(f"{type(model).__name__} has no 2-d convolution to prepare")
    if packed is None:
        packed = members.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if joint:
        join_members(lowered, count, record_values(lowered, lowered.nodes(), example))
    cut = find_cut(lowered, lowered.nodes()) if packed else 0
    return PreparedForward(lowered, count, pack_graph(lowered, cut, example), joint)


def _check_equal(
    forward: Prepared, reference: EnsembleForward, example: tuple[Tensor, ...], tolerance: float | None
) -> None:
    dtypes = {tensor.dtype for tensor in reference.members.stacked.values() if tensor.is_floating_point()}
    if tolerance is None and dtypes <= {torch.float32}:
        tolerance = TOLERANCE
    try:
        prove_equal(reference, forward, example, tolerance)
    except LoadError as error:
        raise UnsupportedModel(f"prepared convolutions: {error}") from error
    except Exception as error:
        name = type(reference.model).__name__
        raise UnsupportedModel(f"the prepared {name} doesn't run: {error}") from error
