"""Turns a forward into the fastest way to run it that gives the same numbers, within a budget of seconds."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.proof import compare_outputs, split_members
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution import modes
from vmap_ensemble.execution.choice_cache import Candidate, Choice, ChoiceCache
from vmap_ensemble.execution.compiled.unrolled import has_convolutions
from vmap_ensemble.execution.cpu.kernel_library import library_name
from vmap_ensemble.execution.modes import Execution, ExecutionOptions, device_of, prove
from vmap_ensemble.execution.readings import LOOP, Readings
from vmap_ensemble.execution.timing import LONG_S, Args, Run, time_block, time_call

logger = logging.getLogger(__name__)

# A compilation can't be interrupted, so `auto` starts one only if this much of its budget is left.
COMPILE_NEEDS_S = 60.0
MIN_ROUNDS, MAX_ROUNDS = 2, 9
# So many times the loop's time on one example ends the measuring of a candidate: it won't serve.
HOPELESS = 1.5


class Auto:
    """Builds, checks and measures the candidates, within the budget."""

    def __init__(self, forward: EnsembleForward, examples: list[Args], options: ExecutionOptions) -> None:
        self.forward, self.examples, self.options = forward, examples, options
        self.runs: dict[str, Run] = {}
        self.candidates: dict[str, Candidate] = {}
        self.readings = Readings()
        self.own: list[list[list[Any]]] = []  # per example, what each member gives
        self.loop_s: list[float] = []  # per example, about
        self.started = time.monotonic()
        folder, device = options.cache_dir, device_of(forward)
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
            self.runs[choice.name] = modes.build_mode(choice.name, self.forward, self.examples, self.options)
            reason = f"{choice.reason} (measured at an earlier start)"
            return self._finish(choice.name, reason, choice.candidates)
        except LoadError as error:
            self._refuse(Candidate(choice.name), error)
            return None

    def _names(self) -> tuple[str, ...]:
        # By how often it wins: what comes late may find the budget spent.
        graphs = ("cudagraph",) if device_of(self.forward).type == "cuda" else ()
        others = ("eager", "compiled") if self.options.packed is None else ("compiled", "eager")
        return ("prepared", *graphs, *others)

    def _left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started)

    def _measure_loop(self) -> None:
        """Run the loop once on each example: its outputs and times are what the candidates are held against."""
        self.candidates[LOOP] = Candidate(LOOP, difference=0.0)
        run = self.runs[LOOP] = modes.build_mode(LOOP, self.forward, self.examples, self.options)
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
            run = modes.build_mode(name, self.forward, self.examples, self.options)
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
