"""Registers the modes of a GPU, each a recording that is made once for each bucket of sizes.

cudagraph       the vmapped forward            branches           members side by side, see branches.py
cudagraph_loop  the plain loop over members    compiled_branches  the same, a member's part compiled by Inductor
cudagraph_fused an encoder's forward in fused steps, by kernels for few rows where they are faster
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cuda.branches import Branches, take_apart
from vmap_ensemble.execution.cuda.few_rows import FewRows
from vmap_ensemble.execution.cuda.graphs import BUCKETS, BatchRows, Recorded, find_bucket
from vmap_ensemble.execution.cuda.recorder import CudaRecorder, Recorder
from vmap_ensemble.execution.modes import build_loop
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args, Run, time_block

# A compilation can't be interrupted. ResNet-18 takes 10 s once and 1 to 4 s from then on (an H100, Inductor's cache).
COMPILE_NEEDS_S = 5.0
CUDA = ["cuda"]


def needs_compiler(_options: ExecutionOptions) -> float:
    """Seconds of the budget that must be left."""
    return COMPILE_NEEDS_S


def only_models(forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> list[str]:
    """Why a forward can't be compiled member by member."""
    return [] if forward.one_vmap is not None else [f"{type(forward).__name__} does more than its model"]


@mode("cudagraph", what="the recorded forward", place=1, devices=CUDA)
def build_vmap(forward: Forward, _examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """Recorded at a bucket's first batch."""
    recorder, lay_out = CudaRecorder(forward.members.device), forward.static_forward
    if lay_out is not None:
        return Built(Recorded(lay_out(options.buckets), forward, recorder))
    return Built(_record(forward, forward, options.buckets, recorder, forward.channels_last), forward.channels_last)


def only_fusable(forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> list[str]:
    """Why a forward has no fused steps."""
    return [] if forward.static_fused is not None else [f"{type(forward).__name__} has no fused steps"]


@mode("cudagraph_fused", what="the recorded forward in fused steps", place=0.8, devices=CUDA,
      reasons_against=only_fusable)  # fmt: skip
def build_fused(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """Recorded at load for the examples' buckets: layers' kernels are measured then, never by a request."""
    lay_out = forward.static_fused
    if lay_out is None:
        raise LoadError(only_fusable(forward, examples, options)[0])
    kernels = FewRows(options.schedule)
    run = Recorded(lay_out(kernels, examples[0], options.buckets), forward, CudaRecorder(forward.members.device))
    for args in examples:
        run(*args)
    kernels.choosing = False
    return Built(run, schedule=kernels.choices)


@mode("cudagraph_loop", what="the recorded loop", place=2, devices=CUDA)
def build_recorded_loop(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """The strongest of the simple ways: nothing but launches is saved."""
    run = build_loop(forward, examples, options).run
    return Built(_record(forward, run, options.buckets, CudaRecorder(forward.members.device)))


@mode("branches", what="the recorded branches", place=0.5, devices=CUDA)
def build_branches(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """Members side by side, images in the memory format that is measured faster on the first example."""

    def build(channels_last: bool) -> Run:
        recorder = CudaRecorder(forward.members.device)
        branches = Branches(take_apart(forward, channels_last), recorder)
        return _record(forward, branches, options.buckets, recorder, channels_last)

    return _in_faster_format(forward, build, examples[0], options.schedule)


@mode("compiled_branches", what="compiled branches", place=2.5, devices=CUDA, reasons_against=only_models,
      needs_s=needs_compiler)  # fmt: skip
def build_compiled_branches(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """As `branches`, compiled at load for the buckets of the examples: no request waits for a compiler.

    A batch beyond them runs on branches that are neither compiled nor recorded. Two memory formats would take twice
    the time to compile, so half precision takes the one that tensor cores want.
    """
    sizes = {find_bucket(options.buckets or BUCKETS, args[0].shape[0]) for args in examples}
    buckets = sorted(size for size in sizes if size is not None)

    channels_last = _has_convolutions(forward) and _is_half(forward)
    recorder, members = CudaRecorder(forward.members.device), take_apart(forward, channels_last)
    rows = BatchRows(Branches(members.compiled(), recorder), recorder.device, buckets, channels_last)
    run = Recorded(rows, Branches(members, recorder), recorder)
    for args in examples:
        run(*args)
    return Built(run, channels_last)


def _record(
    forward: Forward, run: Run, buckets: Sequence[int] | None, recorder: Recorder, channels_last: bool = False
) -> Recorded:
    """A run that takes the forward's arguments, recorded for each bucket of batches."""
    if forward.static_batches is not None:
        return Recorded(forward.static_batches(run, buckets), run, recorder)
    return Recorded(BatchRows(run, recorder.device, buckets, channels_last), run, recorder)


def _in_faster_format(
    forward: Forward, build: Callable[[bool], Run], example: Args, schedule: Mapping[str, Any] | None
) -> Built:
    """What `build(channels_last)` makes in the faster memory format: known from an earlier start, or measured."""
    if schedule is not None:
        known = bool(schedule["channels_last"])
        return Built(build(known), known, schedule)
    if not _has_convolutions(forward):
        return Built(build(False), schedule={"channels_last": False})
    built = {channels_last: build(channels_last) for channels_last in (False, True)}
    seconds = {}
    for channels_last, run in built.items():
        run(*example)  # records
        seconds[channels_last] = time_block(run, example, 0.0)
    fastest = min(seconds, key=lambda channels_last: seconds[channels_last])
    return Built(built[fastest], fastest, {"channels_last": fastest})


def _has_convolutions(forward: Forward) -> bool:
    return forward.one_vmap is not None and forward.one_vmap.has_convolutions


def _is_half(forward: Forward) -> bool:
    return any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in forward.members.tensors())
