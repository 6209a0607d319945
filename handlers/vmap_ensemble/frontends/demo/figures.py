"""Turns what happened in the last minutes into the figures that a page shows."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

WINDOW_S, STEP_S = 300, 10
# Of a busy client's script so many events are kept at most; older ones are forgotten first.
MOST_EVENTS = 20_000
# Not of METRICS: a reply to one request, with its seconds, by status.
REPLY = "reply"


class Figures:
    """What happened in the last five minutes; told by the thread of the forwards, asked by another.

    Args:
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._events: deque[tuple[float, str, float, tuple[str, ...]]] = deque(maxlen=MOST_EVENTS)

    def record(self, name: str, value: float, *labels: str) -> None:
        """Add a value, as `answer_batch` tells of it: its name is one of METRICS, or REPLY."""
        with self._lock:
            self._events.append((self._now(), name, value, labels))

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON knows them.

        Returns:
            `requests`: replies in each step of `step_s` seconds, the oldest first; `replies` by status; and means,
            None where there was nothing: `reply_ms`, `forward_ms`, `items_in_a_forward`, `mutual_information`.
        """
        now = self._now()
        with self._lock:
            recent = [event for event in self._events if now - event[0] < WINDOW_S]
        ages = Counter(int((now - at) // STEP_S) for at, name, *_ in recent if name == REPLY)
        steps = WINDOW_S // STEP_S

        def values(name: str) -> list[float]:
            return [value for _, own, value, _ in recent if own == name]

        return {
            "minutes": WINDOW_S // 60,
            "step_s": STEP_S,
            "requests": [ages[step] for step in reversed(range(steps))],
            "replies": dict(Counter(labels[0] for _, name, _, labels in recent if name == REPLY)),
            "reply_ms": _mean(values(REPLY), 1e3),
            "forward_ms": _mean(values("EnsembleForwardTime"), 1e3),
            "items_in_a_forward": _mean(values("EnsembleBatchSize")),
            "mutual_information": _mean(values("EnsembleMutualInformation")),
            "abstentions": len(values("EnsembleAbstentions")),
        }


def _mean(values: list[float], scale: float = 1.0) -> float | None:
    return scale * sum(values) / len(values) if values else None
