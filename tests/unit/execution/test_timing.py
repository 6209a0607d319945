"""A budget gives every measurement its least number of rounds, and no more of them once it is spent."""

import time

import pytest

from vmap_ensemble.execution.timing import Budget


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_is_left_can_be_overdrawn(clock):
    budget = Budget(2.0)
    clock[0] += 1.5
    assert budget.left_s == 0.5
    clock[0] += 1.5
    assert budget.left_s == -1.0


@pytest.mark.parametrize(("seconds", "rounds"), [(100.0, 5), (3.0, 3), (2.0, 2), (0.0, 2)])
def test_rounds_end_with_the_budget_but_not_before_the_least(clock, seconds, rounds):
    done = []
    for round_ in Budget(seconds).rounds(most=5, least=2):
        clock[0] += 1.0
        done.append(round_)
    assert done == list(range(rounds))
