"""Figures of the last minutes: what is counted, when it is forgotten."""

from __future__ import annotations

import pytest

from vmap_ensemble.frontends.demo.figures import MOST_EVENTS, REPLY, STEP_S, WINDOW_S, Figures


class Clock:
    """Seconds that a test sets."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_wander_from_step_to_step_and_out(clock: Clock) -> None:
    figures = Figures(clock)
    figures.record(REPLY, 0.1, "200")
    clock.seconds += STEP_S
    figures.record(REPLY, 0.3, "415")
    figures.record(REPLY, 0.2, "200")
    told = figures.summary()
    assert told["requests"][-2:] == [1, 2]
    assert len(told["requests"]) * STEP_S == WINDOW_S
    assert told["replies"] == {"200": 2, "415": 1}
    assert told["reply_ms"] == pytest.approx(200)
    clock.seconds += WINDOW_S - STEP_S
    assert figures.summary()["replies"] == {"415": 1, "200": 1}
    clock.seconds += STEP_S
    assert sum(figures.summary()["requests"]) == 0


def test_means_are_none_where_there_was_nothing(clock: Clock) -> None:
    figures = Figures(clock)
    assert figures.summary()["forward_ms"] is None
    figures.record("EnsembleForwardTime", 0.002)
    figures.record("EnsembleForwardTime", 0.004)
    figures.record("EnsembleAbstentions", 1)
    told = figures.summary()
    assert told["forward_ms"] == pytest.approx(3)
    assert told["abstentions"] == 1
    assert told["mutual_information"] is None


def test_a_busy_script_takes_no_more_memory(clock: Clock) -> None:
    figures = Figures(clock)
    for _ in range(MOST_EVENTS + 5):
        figures.record(REPLY, 0.001, "200")
    assert figures.summary()["replies"] == {"200": MOST_EVENTS}
