"""Measures in which order the members of a prepared forward are best computed on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from vmap_ensemble.measuring import time_block

ROUNDS = 5  # readings per candidate and example at most
BUDGET_S = 3.0  # but only one once this has passed
# A candidate so many times slower than the best in the first round is not measured again.
HOPELESS = 1.3


@dataclass(frozen=True)
class Schedule:
    """How the work of all members is ordered.

    Attributes:
        joint: Members lie side by side in the channels, and one call of each layer computes all of them; else
            each member goes through the network on its own.
        at_a_time: If joint: images at a time, 0 for the whole batch; the fewer, the more stays in the cache. Else:
            members at a time, each on its share of the threads.
    """

    joint: bool
    at_a_time: int

    def __str__(self) -> str:
        if not self.joint:
            return f"{self.at_a_time} members at a time"
        return "all members in one call" + (f", {self.at_a_time} image at a time" if self.at_a_time else "")


class Scheduled(Protocol):
    """A forward that can be run in one of several orders."""

    schedule: Schedule

    def schedules(self, batch: int) -> list[Schedule]:
        """What is worth a measurement for batches of at most so many examples."""

    def keep_schedule(self) -> None:
        """Stay with the schedule in use."""

    def __call__(self, *args: Any) -> Any:
        """Run it."""


Forward = TypeVar("Forward", bound=Scheduled)
Example = Sequence[Tensor]


def choose_schedule(forwards: Sequence[Forward], examples: Sequence[Example]) -> Forward:
    """Run every forward in each of its orders, and keep the fastest.

    Args:
        forwards: The same values by different means, at least one.
        examples: Argument tuples, each (B, ...), of the sizes that will be served.

    Returns:
        The fastest over all examples (by the product of its times), with its schedule set.
    """
    batch = max(int(example[0].shape[0]) for example in examples)
    candidates = [(forward, schedule) for forward in forwards for schedule in forward.schedules(batch)]
    best, schedule = candidates[0] if len(candidates) == 1 else _fastest(candidates, examples)
    best.schedule = schedule
    best.keep_schedule()
    return best


def _fastest(candidates: list[tuple[Forward, Schedule]], examples: Sequence[Example]) -> tuple[Forward, Schedule]:
    times_s: dict[int, list[list[float]]] = {index: [[] for _ in examples] for index in range(len(candidates))}
    deadline_s = time.perf_counter() + BUDGET_S
    for round_ in range(ROUNDS):
        if round_ and time.perf_counter() > deadline_s:
            break
        for index, readings in times_s.items():
            forward, schedule = candidates[index]
            forward.schedule = schedule
            for example, own in zip(examples, readings, strict=True):
                # Before the first reading nobody knows how long a call is: then one is made that isn't counted.
                own.append(time_block(forward, tuple(example), about_s=own[-1] if own else 0.0))
        best_s = min(map(_score, times_s.values()))
        times_s = {index: own for index, own in times_s.items() if _score(own) <= HOPELESS ** len(examples) * best_s}
    return candidates[min(times_s, key=lambda index: _score(times_s[index]))]


def _score(readings: list[list[float]]) -> float:
    return math.prod(statistics.median(own) for own in readings)
