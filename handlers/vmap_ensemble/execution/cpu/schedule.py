"""Measures in which order the members of a prepared forward are best computed on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from vmap_ensemble.execution.timing import HOPELESS, Budget, time_block

# Readings of a schedule on each example, and how many it gets in any case.
ROUNDS, FEWER_ROUNDS = 7, 2
# Once choosing has taken so long, the readings that are there decide, and no further forward is built: large
# networks, whose layers are large, gain least.
BUDGET_S = 5.0


@dataclass(frozen=True)
class Schedule:
    """How the work of all members is ordered.

    Attributes:
        joint: Members lie side by side in the channels, and one call of each layer computes them; else each
            member goes through the network on its own.
        at_a_time: If joint: members in a call, of which the fewer need the less cache. Else: members at the same
            time, each on its share of the threads.
    """

    joint: bool
    at_a_time: int

    def __str__(self) -> str:
        return f"{self.at_a_time} members {'in one call' if self.joint else 'at a time'}"


class Scheduled(Protocol):
    """A forward that can be run in one of several orders."""

    schedule: Schedule

    def schedules(self) -> list[Schedule]:
        """What is worth a measurement."""

    def keep_schedule(self) -> None:
        """Stay with the schedule in use."""

    def __call__(self, *args: Any) -> Any:
        """Run it."""


Forward = TypeVar("Forward", bound=Scheduled)
Example = Sequence[Tensor]


def choose_schedule(forwards: Iterable[Forward], examples: Sequence[Example]) -> Forward:
    """Run every forward in each of its orders, and keep the fastest.

    Args:
        forwards: The same values by different means, at least one, built as they are asked for: the slower of two
            gives its memory back before the next is built. A sequence of one that has one schedule isn't run.
        examples: Argument tuples, each (B, ...), of the sizes that will be served.

    Returns:
        The fastest over all examples (by the product of its times), with its schedule set.
    """
    if isinstance(forwards, Sequence) and len(forwards) == 1 and len(forwards[0].schedules()) == 1:
        forwards[0].keep_schedule()  # it is in use already, and there is nothing to compare it with
        return forwards[0]
    best: tuple[Forward, Schedule] | None = None
    best_s, budget = math.inf, Budget(BUDGET_S)
    for forward in forwards:
        for schedule, seconds in _measure(forward, examples, best_s, budget).items():
            if best is None or seconds < best_s:
                best, best_s = (forward, schedule), seconds
        del forward  # or the next one would be built beside it, though it may not be the best
        if budget.left_s < 0:
            break
    if best is None:
        raise ValueError("expected at least one forward with a schedule, got none")
    chosen, schedule = best
    chosen.schedule = schedule
    chosen.keep_schedule()
    return chosen


def _measure(forward: Scheduled, examples: Sequence[Example], best_s: float, budget: Budget) -> dict[Schedule, float]:
    """Schedules that aren't hopeless -> the product of the seconds that each example takes, measured in turns."""
    readings: dict[Schedule, list[list[float]]] = {}
    for schedule in forward.schedules():
        forward.schedule = schedule
        # Before the first reading nobody knows how long a call is: then one is made that isn't counted.
        readings[schedule] = [[time_block(forward, tuple(example), about_s=0.0)] for example in examples]
    first_s = {schedule: math.prod(row[0] for row in own) for schedule, own in readings.items()}
    # One that is hopeless in its first reading gets no second one.
    most_s = HOPELESS ** len(examples) * min([best_s, *first_s.values()])
    readings = {schedule: own for schedule, own in readings.items() if first_s[schedule] <= most_s}
    for _ in budget.rounds(ROUNDS - 1, FEWER_ROUNDS - 1):
        for schedule, own in readings.items():
            forward.schedule = schedule
            for example, row in zip(examples, own, strict=True):
                row.append(time_block(forward, tuple(example), about_s=row[0]))
    return {schedule: math.prod(map(statistics.median, own)) for schedule, own in readings.items()}
