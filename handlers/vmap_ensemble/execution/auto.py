"""Turns a forward into the fastest way to run it that gives the same numbers, within a budget of seconds.

Whatever a candidate raises, at whichever call, makes it a refused one, listed with its reason; the loop serves then.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vmap_ensemble.archive.modes import AUTO, MODULES
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.proof import compare_outputs, split_members
from vmap_ensemble.errors import EnsembleError, LoadError, first_line
from vmap_ensemble.execution import modes
from vmap_ensemble.execution.choice_cache import Candidate, Choice, ChoiceCache
from vmap_ensemble.execution.modes import Execution, ExecutionOptions, prove
from vmap_ensemble.execution.readings import LOOP, Readings
from vmap_ensemble.execution.register import Built, Mode, find_mode
from vmap_ensemble.execution.timing import HOPELESS, LONG_S, Args, Budget, Run, time_block, time_call

logger = logging.getLogger(__name__)

MIN_ROUNDS, MAX_ROUNDS = 2, 9


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns whatever torch, a compiler or somebody's model may raise within it into a reason."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{find_mode(name).what} fails: {type(error).__name__}: {first_line(error)}") from error


class Auto:
    """Builds, checks and measures the candidates, within the budget."""

    def __init__(self, forward: Forward, examples: list[Args], options: ExecutionOptions) -> None:
        self.forward, self.examples, self.options = forward, examples, options
        self.budget = Budget(options.budget_s)
        self.built: dict[str, Built] = {}
        self.candidates: dict[str, Candidate] = {}
        self.readings = Readings()
        self.late: list[str] = []  # what the budget didn't last for
        self.own: list[list[list[Any]]] = []  # per example, what each member gives
        self.loop_s: list[float] = []  # per example, about
        self.modes = self._find_modes()

    def choose(self) -> Execution:
        """The kept choice, if it can be had, or else what is measured fastest.

        Raises:
            LoadError: Not even the loop runs.
        """
        cache = self._open_cache()
        cached = cache.read() if cache else None
        execution = self._reuse(cached) if cached else None
        if execution:
            return execution
        self._measure_loop()
        for mode in self.modes:
            if mode.name not in self.candidates:
                self._measure_candidate(mode)
        self._measure_in_turn()
        execution = self._serve_fastest()
        if cache and self._measured():
            settled = self.readings.is_settled({execution.name, LOOP})
            kept = Choice(execution.name, execution.reason, execution.candidates, execution.schedule)
            cache.write(kept, settled)
        return execution

    def _find_modes(self) -> list[Mode]:
        """The candidates by how often they win, those that need a good part of the budget last."""
        found = []
        for name in list(MODULES):
            try:
                mode = find_mode(name)
            except LoadError as error:
                self._refuse(name, error)
                continue
            if mode.place is not None and mode.runs_on(self.forward):
                found.append((mode.needs_s(self.options), mode.place, mode))
        return [mode for _, _, mode in sorted(found, key=lambda row: row[:2])]

    def _open_cache(self) -> ChoiceCache | None:
        options, device = self.options, self.forward.members.device
        if options.cache_dir is None:
            return None
        libraries = [mode.library(self.forward) for mode in self.modes]
        kernels = [library for library in libraries if library is not None]
        names = [mode.name for mode in self.modes]
        rest = (names, kernels, options.packed_choices)
        return ChoiceCache(options.cache_dir, options.archive_sha, self.examples, device, *rest)

    def _reuse(self, choice: Choice) -> Execution | None:
        """The choice of an earlier start, proved anew; None, and listed as refused, if it can't be had any more."""
        options = dataclasses.replace(self.options, schedule=choice.schedule)
        try:
            self.built[choice.name] = modes.build_mode(choice.name, self.forward, self.examples, options)
            reason = f"{choice.reason} (measured at an earlier start)"
            return self._finish(choice.name, reason, choice.candidates)
        except EnsembleError as error:
            self._refuse(choice.name, error)
            return None

    def _measure_loop(self) -> None:
        """Run the loop once on each example: its outputs and times are what the candidates are held against."""
        self.candidates[LOOP] = Candidate(LOOP, difference=0.0)
        self.built[LOOP] = modes.build_mode(LOOP, self.forward, self.examples, self.options)
        run = self.built[LOOP].run
        for args in self.examples:
            with _named(LOOP):
                outputs, seconds = time_call(run, args)
                self.loop_s.append(seconds if seconds >= LONG_S else min(seconds, time_block(run, args, seconds)))
            self.own.append(split_members(self.forward, outputs, args))

    def _measure_candidate(self, mode: Mode) -> None:
        candidate = self.candidates[mode.name] = Candidate(mode.name)
        try:
            self._check_time(mode)
            built = modes.build_mode(mode.name, self.forward, self.examples, self.options)
            if self._check(candidate, built.run):
                self.built[mode.name] = built
        except EnsembleError as error:
            self._refuse(mode.name, error)

    def _check_time(self, mode: Mode) -> None:
        """Refuse what the budget doesn't last for, but for the first that can be had: it is what usually wins."""
        needs_s, left_s = mode.needs_s(self.options), self.budget.left_s
        if needs_s and left_s < needs_s:
            raise LoadError(f"needs {needs_s:.0f} s of the budget, {max(left_s, 0):.0f} s are left")
        if left_s <= 0 and (len(self.built) > 1 or self._measured()):
            self.late.append(mode.name)
            raise LoadError(f"not measured: the budget of {self.budget.seconds:g} s was spent before its turn")

    def _refuse(self, name: str, error: EnsembleError) -> None:
        """List a candidate that can't serve, with the reason."""
        self.built.pop(name, None)
        self.readings.drop(name)
        candidate = self.candidates.setdefault(name, Candidate(name))
        candidate.refused = first_line(error)
        logger.info("execution '%s' is not a candidate: %s", name, candidate.refused)

    def _check(self, candidate: Candidate, run: Run) -> bool:
        """Compare the candidate on each example; False as soon as it is hopelessly slow on one.

        Raises:
            LoadError: It fails, gives other values than the members' own, or finds no memory for them.
        """
        differences, found_s = [], []
        for args, own, loop_s in zip(self.examples, self.own, self.loop_s, strict=True):
            with _named(candidate.name):
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
        names = list(self.built)
        if names == [LOOP] and not self._measured():  # nothing was compared with it
            self.candidates[LOOP].latency_ms = [1e3 * seconds for seconds in self.loop_s]
            return
        for round_ in self.budget.rounds(MAX_ROUNDS, MIN_ROUNDS):
            for name in [*names[round_ % len(names) :], *names[: round_ % len(names)]]:
                if name in self.built:
                    self._read(name)
        for name in self.readings.seconds:
            self.candidates[name].latency_ms = [1e3 * reading for reading in self.readings.median_s(name)]

    def _read(self, name: str) -> None:
        """A round's readings of a candidate; one that fails by now is refused, but for the loop."""
        try:
            with _named(name):
                self.readings.read(name, self.built[name].run, self.examples, self.loop_s)
        except LoadError as error:
            if name == LOOP:
                raise
            self._refuse(name, error)

    def _measured(self) -> list[str]:
        """Candidates that were timed beside the loop."""
        return [name for name, row in self.candidates.items() if name != LOOP and row.latency_ms and not row.refused]

    def _serve_fastest(self) -> Execution:
        """The fastest that keeps its proof on the sample, whose size may be another than the examples'."""
        while True:
            best = self.readings.fastest() if self.readings.seconds else LOOP
            try:
                return self._finish(best, self._reason(best), list(self.candidates.values()))
            except LoadError as error:
                if best == LOOP:
                    raise
                self._refuse(best, error)

    def _reason(self, best: str) -> str:
        measured = self._measured()
        late = f"; not measured, since the budget was spent: {', '.join(self.late)}" if self.late else ""
        if best != LOOP:
            pairs = zip(self.candidates[LOOP].latency_ms, self.candidates[best].latency_ms, strict=True)
            ratios = ", ".join(f"{loop / own:.2f}x" for loop, own in pairs)
            return f"fastest of {len(measured) + 1}: {ratios} the speed of the loop{late}"
        if measured:
            return f"no candidate was faster than the loop on every example{late}"
        refused = [f"{name}: {row.refused}" for name, row in self.candidates.items() if row.refused]
        return f"no other way could be measured; {'; '.join(refused)}"

    def _finish(self, name: str, reason: str, candidates: list[Candidate]) -> Execution:
        built = self.built[name]
        sample = self.options.sample or self.examples[0]
        execution = Execution(
            name, reason, candidates, built.run, channels_last=built.channels_last, schedule=built.schedule
        )
        prove(execution, self.forward, sample, self.options.tolerance)
        self.built.clear()  # what wasn't chosen gives its memory back
        logger.info("execution '%s' serves '%s': %s", AUTO, name, reason)
        return execution
