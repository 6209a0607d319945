"""Turns a vmapped forward and a mode into the callable that serves: the same values, run the fastest way.

reference  the plain loop over members         eager     one vmapped call
prepared   vmapped, weights prepared           compiled  the archive's native code, else compiled at load
cudagraph  vmapped, recorded per batch size    auto      whichever is measured fastest, never below the loop
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.batching_rules import FastRules
from vmap_ensemble.choice_cache import Candidate, Choice, ChoiceCache
from vmap_ensemble.convolution import build_prepared
from vmap_ensemble.cuda_graphs import BUCKETS, CudaGraphs
from vmap_ensemble.errors import LoadError, SettingsError, first_line
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.kernel_library import library_name
from vmap_ensemble.measuring import LONG_S, LOOP, Args, Readings, Run, time_block, time_call
from vmap_ensemble.native_code import compile_here, why_not
from vmap_ensemble.proof import Proof, compare_outputs, prove_equal, split_members
from vmap_ensemble.schedule import Schedule
from vmap_ensemble.unrolled import UnrolledModules, has_convolutions

logger = logging.getLogger(__name__)

MODES = ("reference", "eager", "prepared", "compiled", "cudagraph", "auto")
BUDGET_S = 20.0
# A compilation can't be interrupted, so `auto` starts one only if this much of its budget is left.
COMPILE_NEEDS_S = 60.0
MIN_ROUNDS, MAX_ROUNDS = 2, 9
# So many times the loop's time on one example ends the measuring of a candidate: it won't serve.
HOPELESS = 1.5


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


def build_execution(
    mode: str,
    forward: EnsembleForward,
    examples: Sequence[Args],
    options: ExecutionOptions | None = None,
) -> Execution:
    """Make the forward ready to serve in a mode.

    Args:
        mode: One of `MODES`.
        forward: The vmapped forward; its loop is the reference.
        examples: Argument tuples of the sizes that will be served, at least one; the first one is what a
            preparation is made for.
        options: See `ExecutionOptions`.

    Returns:
        The callable with its name, reason and candidates.

    Raises:
        SettingsError: The mode is unknown.
        LoadError: The mode was asked for and can't be had, or no example is given. Under `auto` a candidate
            that can't be had is logged and listed with its reason instead.
    """
    options = options or ExecutionOptions()
    if mode not in MODES:
        raise SettingsError(f"execution: expected one of {', '.join(MODES)}, got '{mode}'")
    if not examples:
        raise LoadError("execution: expected at least one example to run the forward on, got none")
    with torch.inference_mode():
        if mode == "auto":
            return _Auto(forward, list(examples), options).choose()
        candidate = Candidate(mode)
        execution = Execution(mode, "asked for", [candidate], _build(mode, forward, examples, options))
        prove(execution, forward, options.sample or examples[0], options.tolerance)
        candidate.difference = execution.proof.largest_difference if execution.proof else None
    return execution


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


def _build(name: str, forward: EnsembleForward, examples: Sequence[Args], options: ExecutionOptions) -> Run:
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
            return CudaGraphs(forward, _device_of(forward), options.buckets)
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
    on_cpu = _device_of(forward).type == "cpu"
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


class _Auto:
    """Builds, checks and measures the candidates, within the budget."""

    def __init__(self, forward: EnsembleForward, examples: list[Args], options: ExecutionOptions) -> None:
        self.forward, self.examples, self.options = forward, examples, options
        self.runs: dict[str, Run] = {}
        self.candidates: dict[str, Candidate] = {}
        self.readings = Readings()
        self.own: list[list[list[Any]]] = []  # per example, what each member gives
        self.loop_s: list[float] = []  # per example, about
        self.started = time.monotonic()
        folder, device = options.cache_dir, _device_of(forward)
        # Asked for where they serve alone: the answer may take a compiler, and a warning that there is none.
        kernels = library_name() if device.type == "cpu" and has_convolutions(forward.model) else None
        self.cache = ChoiceCache(folder, options.archive_sha, examples, device, kernels) if folder else None

    def choose(self) -> Execution:
        cached = self.cache.read() if self.cache else None
        execution = self._reuse(cached) if cached else None
        if execution:
            return execution
        self._measure_loop()
        for name in self._names():
            if name not in self.candidates:
                self._measure_candidate(name)
        self._measure_in_turn()
        best = self.readings.fastest()
        execution = self._finish(best, self._reason(best), list(self.candidates.values()))
        if self.cache:
            schedule = getattr(execution.run, "schedule", None)
            settled = self.readings.is_settled({best, LOOP})
            self.cache.write(Choice(best, execution.reason, execution.candidates, schedule), settled)
        return execution

    def _reuse(self, choice: Choice) -> Execution | None:
        """The choice of an earlier start, proved anew; None, and listed as refused, if it can't be had any more."""
        self.options = dataclasses.replace(self.options, schedule=choice.schedule)
        try:
            self.runs[choice.name] = _build(choice.name, self.forward, self.examples, self.options)
            reason = f"{choice.reason} (measured at an earlier start)"
            return self._finish(choice.name, reason, choice.candidates)
        except LoadError as error:
            self._refuse(Candidate(choice.name), error)
            return None

    def _names(self) -> tuple[str, ...]:
        # By how often it wins: what comes late may find the budget spent.
        graphs = ("cudagraph",) if _device_of(self.forward).type == "cuda" else ()
        others = ("eager", "compiled") if self.options.packed is None else ("compiled", "eager")
        return ("prepared", *graphs, *others)

    def _left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started)

    def _measure_loop(self) -> None:
        """Run the loop once on each example: its outputs and times are what the candidates are held against."""
        self.candidates[LOOP] = Candidate(LOOP, difference=0.0)
        run = self.runs[LOOP] = _build(LOOP, self.forward, self.examples, self.options)
        for args in self.examples:
            outputs, seconds = time_call(run, args)
            self.own.append(split_members(self.forward, outputs, args))
            self.loop_s.append(seconds if seconds >= LONG_S else min(seconds, time_block(run, args, seconds)))

    def _measure_candidate(self, name: str) -> None:
        candidate = Candidate(name)
        needs_s = COMPILE_NEEDS_S if name == "compiled" and self.options.packed is None else 0.0
        try:
            if self._left_s() < needs_s:
                raise LoadError(f"needs {needs_s:.0f} s of the budget, {max(self._left_s(), 0):.0f} s are left")
            run = _build(name, self.forward, self.examples, self.options)
            if self._check(candidate, run):
                self.runs[name] = run
            self.candidates[name] = candidate
        except LoadError as error:
            self._refuse(candidate, error)

    def _refuse(self, candidate: Candidate, error: LoadError) -> None:
        self.runs.pop(candidate.name, None)
        candidate.refused = first_line(error)
        self.candidates[candidate.name] = candidate
        logger.info("execution '%s' is not a candidate: %s", candidate.name, candidate.refused)

    def _check(self, candidate: Candidate, run: Run) -> bool:
        """Compare the candidate on each example; False as soon as it is hopelessly slow on one.

        Raises:
            LoadError: Other values than the members' own, or no memory for them.
        """
        differences, found_s = [], []
        for args, own, loop_s in zip(self.examples, self.own, self.loop_s, strict=True):
            outputs, seconds = time_call(run, args)
            proof = compare_outputs(self.forward, outputs, own, args, self.options.tolerance)
            differences.append(proof.largest_difference)
            candidate.difference = max(differences)
            # The first call of a shape may prepare things, so a slow one gets a second chance.
            found_s.append(seconds if seconds < loop_s else min(seconds, time_block(run, args, loop_s)))
            if found_s[-1] > HOPELESS * loop_s:
                candidate.latency_ms = [1e3 * reading for reading in found_s]
                return False
        return True

    def _measure_in_turn(self) -> None:
        """Rounds over all candidates in turn, so that a busy spell of the machine hits all of them."""
        names = list(self.runs)
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and self._left_s() <= 0:
                break
            for name in [*names[round_ % len(names) :], *names[: round_ % len(names)]]:
                self.readings.read(name, self.runs[name], self.examples, self.loop_s)
        for name in names:
            self.candidates[name].latency_ms = [1e3 * reading for reading in self.readings.median_s(name)]

    def _reason(self, best: str) -> str:
        loop = self.candidates[LOOP].latency_ms
        if best == LOOP:
            return "no candidate was faster than the loop on every example"
        own = self.candidates[best].latency_ms
        ratios = ", ".join(f"{a / b:.2f}x" for a, b in zip(loop, own, strict=True))
        return f"fastest of {len(self.candidates)}: {ratios} the speed of the loop"

    def _finish(self, name: str, reason: str, candidates: list[Candidate]) -> Execution:
        run = self.runs[name]
        sample = self.options.sample or self.examples[0]
        execution = prove(Execution(name, reason, candidates, run), self.forward, sample, self.options.tolerance)
        self.runs.clear()  # what wasn't chosen gives its memory back
        logger.info("execution 'auto' serves '%s': %s", name, reason)
        return execution


def _device_of(forward: EnsembleForward) -> torch.device:
    return forward.members.device
