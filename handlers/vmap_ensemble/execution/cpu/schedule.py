"""Measures in which order the members of a prepared forward are best computed on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from vmap_ensemble.execution.chunking import batch_of
from vmap_ensemble.execution.timing import CLEAR, HOPELESS, Budget, time_block

# Readings of a schedule on each example, and how many it gets in any case.
ROUNDS, FEWER_ROUNDS = 7, 2
# Seconds for choosing, and the share of what is left of a start's. Once they are spent the readings that are there
# decide; a further forward is only built if what the last one took is left: large networks, whose layers are large,
# gain least.
BUDGET_S, SHARE = 5.0, 0.5


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

    def turns(self, count: int) -> int:
        """How many turns so many members take."""
        return math.ceil(count / self.at_a_time)

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


def choose_schedule(
    forwards: Iterable[Forward],
    examples: Sequence[Example],
    budget: Budget | None = None,
    turns: Callable[[Schedule], float] = lambda schedule: 1.0,
) -> Forward:
    """Run every forward in each of its orders, and keep the fastest.

    Args:
        forwards: The same values by different means, at least one, built as they are asked for: the slower of two
            gives its memory back before the next is built. A sequence of one that has one schedule isn't run.
        examples: Argument tuples, each (B, ...), of the sizes that will be served.
        budget: Of the start, of which a share is taken; by default `BUDGET_S` seconds.
        turns: What a schedule's times are multiplied by: where some of the members are measured for all of them.

    Returns:
        The fastest over all examples (by the product of its times), with its schedule set.
    """
    if isinstance(forwards, Sequence) and len(forwards) == 1 and len(forwards[0].schedules()) == 1:
        forwards[0].keep_schedule()  # it is in use already, and there is nothing to compare it with
        return forwards[0]
    best: tuple[Forward, Schedule] | None = None
    best_s, own = math.inf, Budget(BUDGET_S) if budget is None else budget.share(SHARE, BUDGET_S)
    before_s = own.left_s
    for forward in forwards:
        for schedule, seconds in _measure(forward, examples, best_s, own, turns).items():
            if best is None or seconds < best_s:
                best, best_s = (forward, schedule), seconds
        del forward  # or the next one would be built beside it, though it may not be the best
        left_s = own.left_s
        if left_s < before_s - left_s:
            break
        before_s = left_s
    if best is None:
        raise ValueError("expected at least one forward with a schedule, got none")
    chosen, schedule = best
    chosen.schedule = schedule
    chosen.keep_schedule()
    return chosen


def _measure(
    forward: Scheduled,
    examples: Sequence[Example],
    best_s: float,
    budget: Budget,
    turns: Callable[[Schedule], float],
) -> dict[Schedule, float]:
    """Schedules that aren't hopeless -> the product of the seconds that each example takes, measured in turns."""
    readings: dict[Schedule, list[list[float]]] = {}

    def read(schedule: Schedule, example: Example, about_s: float) -> float:
        forward.schedule = schedule
        return turns(schedule) * time_block(forward, tuple(example), about_s=about_s)

    for schedule in forward.schedules():
        # Before the first reading nobody knows how long a call is: then one is made that isn't counted.
        own = readings[schedule] = [[read(schedule, examples[0], 0.0)]]
        for example in examples[1:]:
            own.append([read(schedule, example, own[0][0] * batch_of(tuple(example)) / batch_of(tuple(examples[0])))])
    first_s = {schedule: math.prod(row[0] for row in own) for schedule, own in readings.items()}
    # One that is hopeless in its first reading gets no second one.
    most_s = HOPELESS ** len(examples) * min([best_s, *first_s.values()])
    readings = {schedule: own for schedule, own in readings.items() if first_s[schedule] <= most_s}
    for _ in budget.rounds(ROUNDS - 1 if readings else 0, FEWER_ROUNDS - 1):
        for schedule, own in readings.items():
            for example, row in zip(examples, own, strict=True):
                row.append(read(schedule, example, row[0]))
        if _is_clear(list(readings.values()), best_s):
            break
    return {schedule: math.prod(map(statistics.median, own)) for schedule, own in readings.items()}


def _is_clear(schedules: Sequence[list[list[float]]], best_s: float) -> bool:
    """Whether one of these, or the best of an earlier forward, is far ahead of each of the others in every round."""
    rounds = [[math.prod(row) ** (1 / len(row)) for row in zip(*own, strict=True)] for own in schedules]
    if best_s < math.inf:
        rounds.append([best_s ** (1 / len(schedules[0]))] * len(rounds[0]))
    best, *others = sorted(rounds, key=statistics.median)
    return bool(others) and all(b >= CLEAR * a for other in others for a, b in zip(best, other, strict=True))
