"""Turns a vmapped forward and a mode into the callable that serves: the same values, run the fastest way.

reference  the plain loop over members         eager     one vmapped call
prepared   vmapped, weights prepared          compiled  torch.compile(vmap(f))
cudagraph  vmapped, recorded per batch size    auto      whichever is measured fastest, never below the loop
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.convolution import prepare
from vmap_ensemble.cuda_graphs import BUCKETS, CudaGraphs
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.proof import prove_equal

logger = logging.getLogger(__name__)

Run = Callable[..., Any]
Args = tuple[Any, ...]

MODES = ("reference", "eager", "prepared", "compiled", "cudagraph", "auto")
BUDGET_S = 20.0
# A compilation can't be interrupted, so `auto` starts one only if this much of its budget is left.
COMPILE_NEEDS_S = 60.0
MIN_ROUNDS, MAX_ROUNDS = 3, 15
# A candidate replaces the loop only if it is faster by more than what two runs of one thing differ by.
MARGIN = 0.97


@dataclass
class Candidate:
    """One way to run the forward, and what was found about it.

    Attributes:
        name: The mode.
        latency_ms: Median per example, in the order of the examples; empty if it wasn't measured.
        difference: Largest relative difference to the members' own forwards.
        refused: Why it can't serve; None if it can.
    """

    name: str
    latency_ms: list[float] = field(default_factory=list)
    difference: float | None = None
    refused: str | None = None


@dataclass
class Execution:
    """The chosen way to run the forward; call it with the model's arguments.

    Attributes:
        name: The mode that serves.
        reason: One line: why this one.
        candidates: What was looked at, for the description of the model and for metrics.
        run: Arguments (B, ...) -> outputs (M, B, ...).
    """

    name: str
    reason: str
    candidates: list[Candidate]
    run: Run

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
    """

    budget_s: float = BUDGET_S
    tolerance: float | None = None
    cache_dir: Path | None = None
    archive_sha: str = ""
    buckets: tuple[int, ...] = BUCKETS


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
        run = _build(mode, forward, examples, options)
        difference = prove_equal(forward, run, examples[0], options.tolerance).largest_difference
    return Execution(mode, "asked for", [Candidate(mode, difference=difference)], run)


def _build(name: str, forward: EnsembleForward, examples: Sequence[Args], options: ExecutionOptions) -> Run:
    """The callable of one mode, not yet checked. Anything that goes wrong is a LoadError that names the mode."""
    try:
        if name == "reference":
            return forward.loop
        if name == "eager":
            return forward
        if name == "prepared":
            return _prepare(forward, examples[0], options)
        if name == "compiled":
            run = torch.compile(lambda *args: forward(*args))
            run(*examples[0])  # compiling happens at the first call
            return run
        return CudaGraphs(forward, _device_of(forward), options.buckets)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"execution '{name}' can't be had: {type(error).__name__}: {_first_line(error)}") from error


def _prepare(forward: EnsembleForward, example: Args, options: ExecutionOptions) -> Run:
    own = forward.prepared(example)
    if own is not None:
        return own
    tolerance = {} if options.tolerance is None else {"tolerance": options.tolerance}
    return prepare(forward.model, forward.members, *example, **tolerance)  # type: ignore[arg-type]


class _Auto:
    """Builds, checks and measures the candidates, within the budget."""

    def __init__(self, forward: EnsembleForward, examples: list[Args], options: ExecutionOptions) -> None:
        self.forward, self.examples, self.options = forward, examples, options
        self.runs: dict[str, Run] = {}
        self.candidates: dict[str, Candidate] = {}
        self.started = time.monotonic()
        self.cache = _Cache(forward, examples, options) if options.cache_dir else None

    def choose(self) -> Execution:
        cached = self.cache.read() if self.cache else None
        if cached is not None:
            self._build(cached.name)
            if cached.name in self.runs:
                return self._finish(cached.name, f"{cached.reason} (measured at an earlier start)", cached.candidates)
        for name in self._names():
            if name not in self.candidates:
                self._build(name)
        self._measure()
        best = self._best()
        execution = self._finish(best, self._reason(best), list(self.candidates.values()))
        if self.cache:
            self.cache.write(execution)
        return execution

    def _names(self) -> tuple[str, ...]:
        graphs = ("cudagraph",) if _device_of(self.forward).type == "cuda" else ()
        return ("reference", "eager", "prepared", *graphs, "compiled")

    def _left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started)

    def _build(self, name: str) -> None:
        candidate = self.candidates[name] = Candidate(name)
        needs_s = COMPILE_NEEDS_S if name == "compiled" else 0.0
        try:
            if name != "reference" and self._left_s() < needs_s:
                raise LoadError(f"needs {needs_s:.0f} s of the budget, {max(self._left_s(), 0):.0f} s are left")
            run = _build(name, self.forward, self.examples, self.options)
            differences = [
                prove_equal(self.forward, run, args, self.options.tolerance).largest_difference
                for args in self.examples
            ]
        except LoadError as error:
            if name == "reference":
                raise
            candidate.refused = _first_line(error)
            logger.info("execution '%s' is not a candidate: %s", name, candidate.refused)
        else:
            candidate.difference = max(differences)
            self.runs[name] = run

    def _measure(self) -> None:
        """Rounds over all candidates in turn, so that a busy spell of the machine hits all of them."""
        times_s: dict[tuple[str, int], list[float]] = {}
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and self._left_s() <= 0:
                break
            for name, run in self.runs.items():
                for index, args in enumerate(self.examples):
                    times_s.setdefault((name, index), []).append(_time_s(run, args))
        for name in self.runs:
            medians = [statistics.median(times_s[name, index]) for index in range(len(self.examples))]
            self.candidates[name].latency_ms = [1e3 * median for median in medians]

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

    def _reason(self, best: str) -> str:
        loop = self.candidates["reference"].latency_ms
        if best == "reference":
            return "no candidate was faster than the loop on every example"
        own = self.candidates[best].latency_ms
        ratios = ", ".join(f"{a / b:.2f}x" for a, b in zip(loop, own, strict=True))
        return f"fastest of {len(self.runs)}: {ratios} the speed of the loop"

    def _finish(self, name: str, reason: str, candidates: list[Candidate]) -> Execution:
        run = self.runs[name]
        self.runs.clear()  # what wasn't chosen gives its memory back
        logger.info("execution 'auto' serves '%s': %s", name, reason)
        return Execution(name, reason, candidates, run)


class _Cache:
    """The choice of an earlier start for the same members, sizes, device, versions and threads, as JSON."""

    def __init__(self, forward: EnsembleForward, examples: list[Args], options: ExecutionOptions) -> None:
        device = _device_of(forward)
        self.key = {
            "archive": options.archive_sha,
            "members": len(forward.members.names),
            "examples": [[list(arg.shape) for arg in args if isinstance(arg, torch.Tensor)] for args in examples],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_capability(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(options.cache_dir or ".") / f"execution-{digest}.json"

    def read(self) -> Execution | None:
        """The stored choice without its callable; None if there is none for exactly this key."""
        try:
            stored = json.loads(self.path.read_text())
            if stored["key"] != self.key or stored["name"] not in MODES:
                return None
            candidates = [Candidate(**row) for row in stored["candidates"]]
            return Execution(stored["name"], stored["reason"], candidates, lambda *_: None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the stored choice %s can't be read, measuring again: %s", self.path.name, error)
            return None

    def write(self, execution: Execution) -> None:
        """Store the choice; a folder that can't be written to costs the next start its time, no more."""
        stored = {
            "key": self.key,
            "name": execution.name,
            "reason": execution.reason,
            "candidates": [asdict(candidate) for candidate in execution.candidates],
        }
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(stored, indent=1))
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("the choice can't be stored in %s: %s", self.path.name, error)


def _time_s(run: Run, args: Args) -> float:
    on_gpu = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run(*args)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _device_of(forward: EnsembleForward) -> torch.device:
    tensors = [*forward.members.stacked.values(), *forward.members.shared.values()]
    return tensors[0].device


def _cpu_capability() -> str:
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
