"""Turns a vmapped forward and a mode into the callable that serves: the same values, run the fastest way.

reference  the plain loop over members         eager     one vmapped call
prepared   vmapped, weights prepared           compiled  the archive's native code, else torch.compile(vmap(f))
cudagraph  vmapped, recorded per batch size    auto      whichever is measured fastest, never below the loop
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.choice_cache import Candidate, Choice, ChoiceCache
from vmap_ensemble.chunking import is_out_of_memory
from vmap_ensemble.convolution import build_prepared
from vmap_ensemble.cuda_graphs import BUCKETS, CudaGraphs
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.proof import Proof, compare_outputs, prove_equal, split_members
from vmap_ensemble.schedule import Schedule

logger = logging.getLogger(__name__)

Run = Callable[..., Any]
Args = tuple[Any, ...]

MODES = ("reference", "eager", "prepared", "compiled", "cudagraph", "auto")
BUDGET_S = 20.0
# A compilation can't be interrupted, so `auto` starts one only if this much of its budget is left.
COMPILE_NEEDS_S = 60.0
MIN_ROUNDS, MAX_ROUNDS = 2, 15  # after the reading of the check
# So many times the loop's time on one example ends the measuring of a candidate: it won't serve.
HOPELESS = 1.5
# Readings of one thing on an idle machine have a median of 1.1 times the quickest; beside one busy process 1.9.
SPREAD = 1.3
# A candidate replaces the loop only if it is faster by more than what two runs of one thing differ by.
MARGIN = 0.97


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
            return forward.loop
        if name == "eager":
            return forward
        if name == "prepared":
            return _prepare(forward, examples, options)
        if name == "compiled" and options.packed is not None:
            return options.packed()
        if name == "compiled":
            run = torch.compile(lambda *args: forward(*args))
            run(*examples[0])  # compiling happens at the first call
            return run
        if name == "cudagraph":
            return CudaGraphs(forward, _device_of(forward), options.buckets)
        raise LoadError(f"execution '{name}': no such mode")
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"execution '{name}' can't be had: {type(error).__name__}: {_first_line(error)}") from error


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
        self.readings_s: dict[str, list[list[float]]] = {}
        self.own: list[list[list[Any]]] = []  # per example, what each member gives
        self.started = time.monotonic()
        folder, device = options.cache_dir, _device_of(forward)
        self.cache = ChoiceCache(folder, options.archive_sha, examples, device) if folder else None

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
        best = self._best()
        execution = self._finish(best, self._reason(best), list(self.candidates.values()))
        if self.cache:
            schedule = getattr(execution.run, "schedule", None)
            self.cache.write(Choice(best, execution.reason, execution.candidates, schedule), self._is_settled(best))
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
        """Read the loop once on each example; its outputs are what the candidates are held against."""
        self.candidates["reference"] = Candidate("reference", difference=0.0)
        run = self.runs["reference"] = _build("reference", self.forward, self.examples, self.options)
        self.readings_s["reference"] = []
        for args in self.examples:
            outputs, seconds = _timed(run, args)
            self.own.append(split_members(self.forward, outputs, args))
            self.readings_s["reference"].append([seconds])

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
        candidate.refused = _first_line(error)
        self.candidates[candidate.name] = candidate
        logger.info("execution '%s' is not a candidate: %s", candidate.name, candidate.refused)

    def _check(self, candidate: Candidate, run: Run) -> bool:
        """Compare and read the candidate on each example; False as soon as it is hopelessly slow on one.

        Raises:
            LoadError: Other values than the members' own, or no memory for them.
        """
        readings = self.readings_s[candidate.name] = []
        differences = []
        for args, own, loop in zip(self.examples, self.own, self.readings_s["reference"], strict=True):
            outputs, seconds = _timed(run, args)
            proof = compare_outputs(self.forward, outputs, own, args, self.options.tolerance)
            differences.append(proof.largest_difference)
            candidate.difference = max(differences)
            # The first call of a shape may prepare things, so a slow one gets a second chance.
            readings.append([seconds] if seconds < min(loop) else [seconds, _timed(run, args)[1]])
            if min(readings[-1]) > HOPELESS * min(loop):
                candidate.latency_ms = [1e3 * min(reading) for reading in readings]
                return False
        return True

    def _measure_in_turn(self) -> None:
        """Rounds over all candidates in turn, so that a busy spell of the machine hits all of them."""
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and self._left_s() <= 0:
                break
            for name, run in self.runs.items():
                for index, args in enumerate(self.examples):
                    self.readings_s[name][index].append(_timed(run, args)[1])
        for name in self.runs:
            # The quickest reading is the one that other processes disturbed least.
            self.candidates[name].latency_ms = [1e3 * min(readings) for readings in self.readings_s[name]]

    def _best(self) -> str:
        """The fastest over all examples, among those that are slower than the loop on none of them."""
        loop = self.candidates["reference"].latency_ms
        scores = {"reference": 1.0}
        for name in self.runs:
            ratios = [own / other for own, other in zip(self.candidates[name].latency_ms, loop, strict=True)]
            score = math.prod(ratios) ** (1 / len(ratios))
            if max(ratios) <= 1.0 and score < MARGIN:
                scores[name] = score
        return min(scores, key=lambda name: scores[name])

    def _is_settled(self, best: str) -> bool:
        """Whether the readings that decided agree with each other; on a busy machine they don't."""
        for name in {best, "reference"}:
            for readings in self.readings_s[name]:
                warm = readings[1:] or readings
                if statistics.median(warm) > SPREAD * min(warm):
                    return False
        return True

    def _reason(self, best: str) -> str:
        loop = self.candidates["reference"].latency_ms
        if best == "reference":
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


def _timed(run: Run, args: Args) -> tuple[Any, float]:
    """What the run gives, and the seconds it takes.

    Raises:
        LoadError: There is not enough memory for it.
    """
    on_gpu = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    try:
        outputs = run(*args)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise LoadError(f"ran out of memory on a batch: {_first_line(error)}") from error
        raise
    if on_gpu:
        torch.cuda.synchronize()
    return outputs, time.perf_counter() - started


def _device_of(forward: EnsembleForward) -> torch.device:
    tensors = [*forward.members.stacked.values(), *forward.members.shared.values()]
    return tensors[0].device


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
