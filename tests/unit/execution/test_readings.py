"""Readings are medians of blocks; the loop serves unless another beats it beyond the noise. Times are scripted."""

import time

import pytest
import torch

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution import timing
from vmap_ensemble.execution.readings import LOOP, Readings
from vmap_ensemble.execution.timing import time_block, time_call


def script(seconds, first_s=None):
    readings = Readings()
    readings.seconds = seconds
    readings.first_s = first_s or {name: [row[0] for row in rows] for name, rows in seconds.items()}
    return readings


@pytest.fixture
def calls(monkeypatch):
    """Calls and pauses in order; a call takes what the run says."""
    log = []

    def call(run, args):
        log.append(run.__name__)
        return None, run(*args)

    monkeypatch.setattr(timing, "time_call", call)
    monkeypatch.setattr(time, "sleep", log.append)
    return log


def test_a_block_begins_with_a_pause_and_a_call_that_is_not_counted(calls):
    times = iter([0.004, 0.001, 0.003, 0.002, 0.002, 0.010])

    def own():
        return next(times)

    assert time_block(own, (), 0.004) == 0.002  # the median of five, for 20 ms of the first call's 4 ms
    assert calls == [timing.PAUSE_S, *["own"] * 6]


def test_a_block_of_a_tiny_forward_has_enough_calls_but_ends(calls):
    def tiny():
        return 1e-5

    assert time_block(tiny, (), 1e-5) == 1e-5
    assert len(calls) == 2 + timing.MOST_CALLS


def test_a_long_forward_is_called_once(calls):
    def long():
        return 2.0

    assert time_block(long, (), 2.1) == 2.0
    assert calls == ["long"]


def test_readings_are_added_round_by_round(calls):
    readings = Readings()
    for seconds in (1.0, 3.0, 2.0):
        readings.read("a", lambda x, s=seconds: s * x, [(1,), (10,)], [9.0, 9.0])
    assert readings.seconds == {"a": [[1.0, 3.0, 2.0], [10.0, 30.0, 20.0]]}
    assert readings.median_s("a") == [2.0, 20.0]


def test_the_fastest_over_all_examples_is_taken():
    readings = script({LOOP: [[1.0] * 4, [1.0] * 4], "a": [[0.5] * 4, [0.9] * 4], "b": [[0.8] * 4, [0.5] * 4]})
    assert readings.fastest() == "b"


@pytest.mark.parametrize(
    ("own", "loop"),
    [
        pytest.param([[0.98] * 9], [[1.0] * 9], id="a gain as small as the noise"),
        pytest.param([[0.5] * 9, [1.01] * 9], [[1.0] * 9] * 2, id="slower on one example"),
        pytest.param([[0.5] * 6 + [1.5] * 3], [[1.0] * 9], id="slower in a third of the rounds"),
        pytest.param([[0.4, 2.0, 2.0]], [[1.0] * 3], id="quick once"),
        pytest.param([[0.9] * 4 + [9.0] * 5], [[1.0] * 4 + [8.0] * 5], id="slower in the same slow spell"),
    ],
)
def test_the_loop_stays_unless_it_is_beaten_beyond_the_noise(own, loop):
    assert script({LOOP: loop, "a": own}).fastest() == LOOP


def test_a_slow_spell_of_the_machine_hits_both():
    spell = [1.0, 1.0, 5.0, 1.0, 6.0, 1.0, 4.0, 1.0]
    assert script({LOOP: [spell], "a": [[0.8 * reading for reading in spell]]}).fastest() == "a"


def test_one_disturbed_round_does_not_cost_the_choice():
    assert script({LOOP: [[1.0] * 9], "a": [[0.6] * 8 + [3.0]]}).fastest() == "a"


@pytest.mark.parametrize(("rows", "settled"), [([[1.0, 1.1, 1.2]], True), ([[1.0, 1.0], [1.0, 2.0, 2.0]], False)])
def test_readings_that_disagree_are_not_settled(rows, settled):
    assert script({"a": rows, "b": [[1.0, 9.0]]}).is_settled({"a"}) is settled


def test_a_check_that_differs_from_the_rounds_is_not_settled():
    assert not script({"a": [[1.0]]}, {"a": [2.0]}).is_settled({"a"})


@pytest.mark.parametrize(
    ("loop", "rival", "first", "clear"),
    [
        pytest.param([[1.3], [1.3]], [[9.0], [9.0]], 1.3, True, id="far ahead in every round"),
        pytest.param([[1.2], [1.2]], [[9.0], [9.0]], 1.3, False, id="a little ahead"),
        pytest.param([[2.0], [1.0]], [[9.0], [9.0]], 1.3, True, id="far ahead on average"),
        pytest.param([[2.0, 1.2], [2.0, 1.2]], [[9.0] * 2] * 2, 1.3, False, id="not in the second round"),
        pytest.param([[2.0], [2.0]], [[9.0], [9.0]], 1.2, False, id="not when it was checked"),
        pytest.param([[2.0], [2.0]], [[1.2], [1.2]], 1.3, False, id="not of every rival"),
    ],
)
def test_rounds_are_clear_where_the_fastest_is_far_ahead_in_each(loop, rival, first, clear):
    rounds = len(loop[0])
    seconds = {LOOP: loop, "best": [[1.0] * rounds, [1.0] * rounds], "rival": rival}
    first_s = {LOOP: [first, first], "best": [1.0, 1.0], "rival": [9.0, 9.0]}
    assert script(seconds, first_s).is_clear() is clear


def test_readings_of_some_members_count_for_all(calls):
    readings = Readings()
    readings.read("a", lambda x: x, [(1.0,)], [9.0], 2.5)
    assert readings.median_s("a") == [2.5]


def test_a_call_gives_outputs_and_seconds():
    outputs, seconds = time_call(lambda x: time.sleep(0.01) or x + 1, (1,))
    assert outputs == 2
    assert seconds >= 0.01


def test_too_little_memory_is_a_reason_and_other_errors_are_not_hidden():
    def fail(error):
        raise error

    with pytest.raises(LoadError, match=r"ran out of memory on a batch: tried to allocate 9 TiB$"):
        time_call(fail, (torch.OutOfMemoryError("tried to allocate 9 TiB\nmore"),))
    with pytest.raises(RuntimeError, match="shapes"):
        time_call(fail, (RuntimeError("shapes"),))
