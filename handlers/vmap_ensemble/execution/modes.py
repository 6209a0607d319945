"""Turns a vmapped forward and a mode into the callable that serves: the same values, run the fastest way.

reference  the plain loop over members         eager     one vmapped call
prepared   vmapped, weights prepared           compiled  the archive's native code, else compiled at load
cudagraph  vmapped, recorded per batch size    auto      whichever is measured fastest, never below the loop
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.proof import Proof, prove_equal
from vmap_ensemble.encoders.batching_rules import FastRules
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.execution.compiled.native_code import compile_here, why_not
from vmap_ensemble.execution.compiled.unrolled import UnrolledModules, has_convolutions
from vmap_ensemble.execution.cpu.networks import build_prepared
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.cuda.graphs import BUCKETS, CudaGraphs
from vmap_ensemble.execution.timing import Args, Run

logger = logging.getLogger(__name__)

MODES = ("reference", "eager", "prepared", "compiled", "cudagraph", "auto")
BUDGET_S = 20.0


@dataclass
class Execution:
    """The chosen way to run the forward; call it with the model's arguments.

    Attributes:
        name: The mode that serves.
        reason: One line: why this one.
        candidates: What was looked at, for the description of the model and for metrics.
        run: Arguments (B, ...) -> outputs (M, B, ...).
        proof: The comparison of exactly this callable with the members' own forwards, at this start.
        proof_s: Seconds that it took.
    """

    name: str
    reason: str
    candidates: list[Candidate]
    run: Run
    proof: Proof | None = None
    proof_s: float = 0.0

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


@dataclass(frozen=True)
class ExecutionOptions:
    """How `auto` measures, and where it keeps its choice.

    Attributes:
        budget_s: Time that measuring may take; building a candidate that was begun is finished.
        tolerance: Largest relative difference to the members' own forwards; by default that of the dtype.
        cache_dir: Folder for the choice; None keeps none.
        archive_sha: What the choice is for: a hash of the members.
        buckets: Batch sizes that CUDA graphs are recorded for.
        sample: Batch that what serves is proved on; by default the first example.
        schedule: In which order `prepared` computes the members; measured by default.
        packed: Loads the forward that the archive brings as native code; None if it brings none.
    """

    budget_s: float = BUDGET_S
    tolerance: float | None = None
    cache_dir: Path | None = None
    archive_sha: str = ""
    buckets: tuple[int, ...] = BUCKETS
    sample: Args | None = None
    schedule: Schedule | None = None
    packed: Callable[[], Run] | None = None


def prove(execution: Execution, forward: EnsembleForward, sample: Args, tolerance: float | None = None) -> Execution:
    """Prove what is about to serve: the only comparison of a start that has nothing to measure.

    Args:
        execution: Gets the proof, and the seconds that it took.
        forward: The members' own forwards.
        sample: The batch to compare on.
        tolerance: As `prove_equal` takes it.

    Raises:
        LoadError: As `prove_equal`.
    """
    started = time.perf_counter()
    with torch.inference_mode():
        execution.proof = prove_equal(forward, execution.run, sample, tolerance)
    execution.proof_s = time.perf_counter() - started
    return execution


def build_mode(name: str, forward: EnsembleForward, examples: Sequence[Args], options: ExecutionOptions) -> Run:
    """The callable of one mode, not yet checked. Anything that goes wrong is a LoadError that names the mode."""
    try:
        if name == "reference":
            return _loop(forward)
        if name == "eager":
            return forward
        if name == "prepared":
            return _prepare(forward, examples, options)
        if name == "compiled" and options.packed is not None:
            return options.packed()
        if name == "compiled":
            return _compile(forward, examples)
        if name == "cudagraph":
            return CudaGraphs(forward, device_of(forward), options.buckets)
        raise LoadError(f"execution '{name}': no such mode")
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"execution '{name}' can't be had: {type(error).__name__}: {first_line(error)}") from error


def _loop(forward: EnsembleForward) -> Run:
    """The plain loop, on modules of the members' own: that spares each call the swapping of weights."""
    if type(forward) is not EnsembleForward:
        return forward.loop
    try:
        return UnrolledModules(forward).eval()
    except Exception as error:  # whatever the copying of somebody's module may raise
        name = type(forward.model).__name__
        logger.warning("the loop swaps weights: %s can't be copied: %s", name, first_line(error))
        return forward.loop


def _compile(forward: EnsembleForward, examples: Sequence[Args]) -> Run:
    """The forward compiled at load: vmap's, or members unrolled where that would make grouped convolutions slow."""
    on_cpu = device_of(forward).type == "cpu"
    if on_cpu and why_not(forward, examples[0]) is None and has_convolutions(forward.model):
        return compile_here(forward, [args[0] for args in examples])
    plain = _without_packed_weights(forward)
    run: Run = torch.compile(lambda *args: plain(*args))
    for args in examples:  # compiling happens at the first call of a size, which should be none of a request's
        run(*args)
    return run


def _without_packed_weights(forward: EnsembleForward) -> EnsembleForward:
    """The same forward on plain weights: Inductor refuses reordered matrices that aren't constants of its own."""
    if not isinstance(getattr(forward, "rules", nullcontext)(), FastRules):
        return forward
    plain, rules = copy.copy(forward), FastRules()
    plain.rules = lambda: rules
    return plain


def _prepare(forward: EnsembleForward, examples: Sequence[Args], options: ExecutionOptions) -> Run:
    """Prepared weights, not yet compared with the members' own: that is done for every mode alike."""
    own = forward.prepared(examples[0])
    return build_prepared(forward.model, forward.members, examples, schedule=options.schedule) if own is None else own


def device_of(forward: EnsembleForward) -> torch.device:
    return forward.members.device
