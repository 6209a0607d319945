"""Turns a forward into the fastest way to run it that gives the same numbers, within a budget of seconds.

Whatever a candidate raises, at whichever call, makes it a refused one, listed with its reason; the loop serves then.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vmap_ensemble.archive.modes import AUTO, MODULES
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.proof import compare_outputs, split_members
from vmap_ensemble.errors import EnsembleError, LoadError, first_line
from vmap_ensemble.execution import modes
from vmap_ensemble.execution.choice_cache import Candidate, Choice, ChoiceCache
from vmap_ensemble.execution.chunking import batch_of
from vmap_ensemble.execution.modes import Execution, ExecutionOptions, prove
from vmap_ensemble.execution.readings import LOOP, Readings
from vmap_ensemble.execution.register import Built, Mode, find_mode
from vmap_ensemble.execution.timing import HOPELESS, LONG_S, Args, Budget, Run, time_block, time_call

logger = logging.getLogger(__name__)

MIN_ROUNDS, MAX_ROUNDS = 2, 9
# Measuring takes about so many times what the loop takes on all examples. Where the budget isn't that long, some of
# the members are measured for all,
PASSES = 8
# if what all of them share, and is computed once, is at most so much of one.
MOSTLY_OWN = 0.1


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
        self.forward, self.examples = forward, examples
        self.budget = Budget(options.budget_s)
        self.options = dataclasses.replace(options, budget=self.budget)
        self.measured: Forward = forward  # what is measured: it, or a part of it
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
        self.measured = self._choose_part()
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

    def _choose_part(self) -> Forward:
        """All members, or as few as keep all cores busy where measuring all would take longer than the budget."""
        forward, options, few = self.forward, self.options, max(2, torch.get_num_threads())
        plain, count = forward.one_vmap, len(forward.members.names)
        # What an archive brings is made for all members.
        brings = options.packed is not None or options.graph_folder is not None
        if plain is None or brings or few >= count or forward.members.device.type != "cpu" or not _is_own(forward):
            return forward
        part = plain.part(0, few)
        with _named(LOOP):
            seconds = time_call(modes.build_mode(LOOP, part, self.examples, options).run, self.examples[0])[1]
        rows = sum(map(batch_of, self.examples)) / batch_of(self.examples[0])
        return forward if PASSES * seconds * rows * count / few <= options.budget_s else part

    @property
    def _is_part(self) -> bool:
        return self.measured is not self.forward

    def _growth(self, name: str) -> float:
        """How much longer a call takes for all members than for those that are measured."""
        if not self._is_part:
            return 1.0
        found = self.built[name].growth
        return len(self.forward.members.names) / len(self.measured.members.names) if found is None else found

    def _measure_loop(self) -> None:
        """Run the loop once on each example: its outputs and times are what the candidates are held against."""
        self.candidates[LOOP] = Candidate(LOOP, difference=0.0)
        self.built[LOOP] = self._build(LOOP)
        run = self.built[LOOP].run
        for args in self.examples:
            with _named(LOOP):
                outputs, seconds = time_call(run, args)
                self.loop_s.append(seconds if seconds >= LONG_S else min(seconds, time_block(run, args, seconds)))
            self.own.append(split_members(self.measured, outputs, args))
        self._note_first(LOOP, self.loop_s)

    def _build(self, name: str) -> Built:
        count = len(self.forward.members.names) if self._is_part else None
        options = dataclasses.replace(self.options, count=count)
        return modes.build_mode(name, self.measured, self.examples, options)

    def _note_first(self, name: str, seconds: list[float]) -> None:
        self.readings.first_s[name] = [self._growth(name) * reading for reading in seconds]

    def _measure_candidate(self, mode: Mode) -> None:
        candidate = self.candidates[mode.name] = Candidate(mode.name)
        try:
            self._check_time(mode)
            self.built[mode.name] = self._build(mode.name)
            if not self._check(candidate, self.built[mode.name].run):
                self.built.pop(mode.name)
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
        """Compare the candidate on each example; False as soon as it is hopelessly far behind the best so far on one.

        Raises:
            LoadError: It fails, gives other values than the members' own, or finds no memory for them.
        """
        differences, found_s = [], []
        best_s = min(self.readings.first_s.values(), key=math.prod)
        growth = self._growth(candidate.name)
        for args, own, loop_s, most_s in zip(self.examples, self.own, self.loop_s, best_s, strict=True):
            with _named(candidate.name):
                outputs, seconds = time_call(run, args)
                proof = compare_outputs(self.measured, outputs, own, args, self.options.tolerance)
                differences.append(proof.largest_difference)
                candidate.difference = max(differences)
                # The first call of a shape may prepare things, so a short or slow one gets a second chance.
                if seconds < LONG_S or seconds >= loop_s:
                    seconds = min(seconds, time_block(run, args, loop_s))
                found_s.append(seconds)
            if growth * found_s[-1] > HOPELESS * most_s:
                candidate.latency_ms = [1e3 * growth * reading for reading in found_s]
                return False
        self._note_first(candidate.name, found_s)
        return True

    def _measure_in_turn(self) -> None:
        """Rounds over all candidates in turn, so that a busy spell of the machine hits all of them."""
        names = list(self.built)
        if names == [LOOP] and not self._measured():  # nothing was compared with it
            self.candidates[LOOP].latency_ms = [1e3 * seconds for seconds in self.readings.first_s[LOOP]]
            return
        for round_ in self.budget.rounds(MAX_ROUNDS, MIN_ROUNDS):
            for name in [*names[round_ % len(names) :], *names[: round_ % len(names)]]:
                if name in self.built:
                    self._read(name)
            if self.readings.is_clear():
                break
        for name in self.readings.seconds:
            self.candidates[name].latency_ms = [1e3 * reading for reading in self.readings.median_s(name)]

    def _read(self, name: str) -> None:
        """A round's readings of a candidate; one that fails by now is refused, but for the loop."""
        try:
            with _named(name):
                self.readings.read(name, self.built[name].run, self.examples, self.loop_s, self._growth(name))
        except LoadError as error:
            if name == LOOP:
                raise
            self._refuse(name, error)

    def _measured(self) -> list[str]:
        """Candidates that were timed beside the loop."""
        return [name for name, row in self.candidates.items() if name != LOOP and row.latency_ms and not row.refused]

    def _serve_fastest(self) -> Execution:
        """The fastest that keeps its proof on the sample, whose size may be another than the examples'."""
        schedules = {name: built.schedule for name, built in self.built.items()}
        if self._is_part:
            self.built.clear()  # it gives its memory back before all members are prepared
        while True:
            best = self.readings.fastest() if self.readings.seconds else LOOP
            try:
                if self._is_part:
                    options = dataclasses.replace(self.options, schedule=schedules[best])
                    self.built[best] = modes.build_mode(best, self.forward, self.examples, options)
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
            some = f", on {len(self.measured.members.names)} of the members" if self._is_part else ""
            return f"fastest of {len(measured) + 1}: {ratios} the speed of the loop{some}{late}"
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


def _is_own(forward: Forward) -> bool:
    """Whether time grows with the number of members: what they share is little of what each computes with."""
    own = sum(tensor[0].nbytes for tensor in forward.members.stacked.values())
    return sum(tensor.nbytes for tensor in forward.members.shared.values()) <= MOSTLY_OWN * own
