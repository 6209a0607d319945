"""Turns runs of candidates into readings that can be compared, and the readings into a choice.

A reading is the median of a block of calls in a row, as a server makes them. Before each block there is a pause, and
its first call isn't counted: OpenMP's helper threads spin for some 7 ms after the last region of whatever ran before,
on cores that the next candidate needs, which is many times a small network's forward.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vmap_ensemble.execution.timing import CLEAR, Args, Run, time_block

LOOP = "reference"
# A candidate replaces the loop only if it is faster by more than what two runs of one thing differ by,
MARGIN = 0.97
# in so many of the rounds.
SHARE = 0.75
# Blocks of one thing on an idle machine differ less than this from the quickest; beside a busy process more.
SPREAD = 1.3


class Readings:
    """Seconds per candidate, example and round; the loop is one of the candidates.

    Attributes:
        seconds: Candidate -> per example the readings, one per round.
        first_s: Candidate -> per example what it took when it was checked, before the first round. It decides
            nothing, since the rivals were checked at other times, but speaks against a round that differs.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[list[float]]] = {}
        self.first_s: dict[str, list[float]] = {}

    def read(
        self, name: str, run: Run, examples: Sequence[Args], about_s: Sequence[float], growth: float = 1.0
    ) -> None:
        """Add a round's readings of one candidate.

        Args:
            name: The candidate.
            run: It.
            examples: What it is called with.
            about_s: What each example takes, about.
            growth: What a reading is multiplied by: where it is of some members, and counts for all.
        """
        rows = self.seconds.setdefault(name, [[] for _ in examples])
        for args, seconds, row in zip(examples, about_s, rows, strict=True):
            row.append(growth * time_block(run, args, seconds))

    def drop(self, name: str) -> None:
        """Forget a candidate that can't serve after all."""
        self.seconds.pop(name, None)
        self.first_s.pop(name, None)

    def median_s(self, name: str) -> list[float]:
        """A candidate's median reading on each example."""
        return [statistics.median(row) for row in self.seconds[name]]

    def fastest(self) -> str:
        """The fastest over all examples; the loop, unless another beats it beyond the noise.

        Beats it: its median is not above the loop's on any example, and its time is below `MARGIN` of the loop's on
        average over the examples, in the middle round as in `SHARE` of all rounds. Candidates are compared with the
        loop's reading of the same round, so that a slow spell of the machine hits both.
        """
        scores = {LOOP: 1.0}
        for name in self.seconds:
            if name == LOOP or not self._is_never_slower(name):
                continue
            rounds = sorted(self._scores(name))
            score, nearly_worst = statistics.median(rounds), rounds[min(len(rounds) - 1, int(SHARE * len(rounds)))]
            if score < MARGIN and nearly_worst < 1.0:
                scores[name] = score
        return min(scores, key=lambda name: scores[name])

    def is_clear(self) -> bool:
        """Whether further rounds would change nothing: the fastest is far ahead in each one, and was when checked."""
        best = self.fastest()
        return all(self._lead(best, other) >= CLEAR for other in self.seconds if other != best)

    def _lead(self, name: str, other: str) -> float:
        """How far a candidate is ahead of another: the least of all rounds, the geometric mean over the examples."""
        ours, theirs = (zip(*self._all(key), strict=True) for key in (name, other))
        return min(
            statistics.geometric_mean(b / a for a, b in zip(own, rows, strict=True))
            for own, rows in zip(ours, theirs, strict=True)
        )

    def _all(self, name: str) -> list[list[float]]:
        """Per example the reading of the check, then those of the rounds."""
        return [[first, *row] for first, row in zip(self.first_s[name], self.seconds[name], strict=True)]

    def _is_never_slower(self, name: str) -> bool:
        loop = self.seconds[LOOP]
        ratios = [
            statistics.median(own / other for own, other in zip(row, theirs, strict=True))
            for row, theirs in zip(self.seconds[name], loop, strict=True)
        ]
        return max(ratios) <= 1.0

    def _scores(self, name: str) -> list[float]:
        """Per round the candidate's time by the loop's: the geometric mean over the examples."""
        own, loop = (list(zip(*self.seconds[key], strict=True)) for key in (name, LOOP))
        return [
            statistics.geometric_mean(a / b for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in zip(own, loop, strict=True)
        ]

    def is_settled(self, names: set[str]) -> bool:
        """Whether each one's readings agree with each other; on a busy machine they don't."""
        rows = [row for name in names for row in self._all(name)]
        return all(statistics.median(row) <= SPREAD * min(row) for row in rows)
