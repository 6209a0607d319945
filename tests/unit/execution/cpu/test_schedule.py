"""The fastest of several forwards is kept, and the others give their memory back in time."""

import weakref

import pytest
import torch

from vmap_ensemble.execution.cpu import schedule
from vmap_ensemble.execution.cpu.schedule import Schedule, choose_schedule

EXAMPLES = [(torch.zeros(1, 2),)]


class Timed:
    """A forward of one schedule that takes so many seconds by the clock below."""

    def __init__(self, seconds):
        self.seconds, self.schedule = seconds, Schedule(True, int(seconds))

    def schedules(self):
        return [self.schedule]

    def keep_schedule(self):
        self.kept = True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(schedule, "time_block", lambda forward, example, about_s: forward.seconds)


@pytest.mark.parametrize("seconds", [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (3.0, 2.0, 1.0)])
def test_the_fastest_is_kept(seconds):
    chosen = choose_schedule(map(Timed, seconds), EXAMPLES)
    assert (chosen.seconds, chosen.kept) == (1.0, True)


def test_only_the_best_is_held_while_the_next_is_built():
    built, alive = [], []

    def forwards():
        for seconds in (2.0, 3.0, 1.0, 4.0):
            alive.append(sum(other() is not None for other in built))
            forward = Timed(seconds)
            built.append(weakref.ref(forward))
            yield forward
            del forward

    choose_schedule(forwards(), EXAMPLES)
    assert alive == [0, 1, 1, 1]


class Alternating(Timed):
    """Two schedules, of which the slower one has a lucky first reading."""

    def __init__(self):
        self.readings = {1: iter([1.0] + 20 * [1.2]), 2: iter(20 * [1.1])}
        self.order = []

    def schedules(self):
        return [Schedule(False, 1), Schedule(False, 2)]

    @property
    def seconds(self):
        self.order.append(self.schedule.at_a_time)
        return next(self.readings[self.schedule.at_a_time])


@pytest.mark.parametrize(("budget_s", "rounds"), [(60.0, schedule.ROUNDS), (-1.0, schedule.FEWER_ROUNDS)])
def test_schedules_take_turns_for_as_long_as_there_is_time(monkeypatch, budget_s, rounds):
    monkeypatch.setattr(schedule, "BUDGET_S", budget_s)
    chosen = choose_schedule([Alternating()], EXAMPLES)
    assert chosen.order == [1, 2] * rounds
    assert chosen.schedule.at_a_time == (2 if rounds > 2 else 1)


class Apart(Timed):
    """Two schedules, the second of which takes so many times the first one's seconds."""

    def __init__(self, factor=1.0):
        self.seconds_of, self.order = {1: 1.0, 2: factor}, []

    def schedules(self):
        return [Schedule(False, 1), Schedule(False, 2)]

    @property
    def seconds(self):
        self.order.append(self.schedule.at_a_time)
        return self.seconds_of[self.schedule.at_a_time]


@pytest.mark.parametrize(("factor", "rounds"), [(1.3, 2), (0.75, 2), (1.2, schedule.ROUNDS)])
def test_rounds_end_once_one_schedule_is_clearly_ahead(factor, rounds):
    chosen = choose_schedule([Apart(factor)], EXAMPLES)
    assert chosen.order == [1, 2] * rounds
    assert chosen.schedule.at_a_time == (2 if factor < 1 else 1)


def test_schedules_of_some_members_are_weighed_by_the_turns_of_all():
    turns = {1: 5 / 2, 2: 3}  # of 5 members, where 2 were measured
    assert choose_schedule([Apart(0.9)], EXAMPLES).schedule.at_a_time == 2
    chosen = choose_schedule([Apart(0.9)], EXAMPLES, None, lambda schedule: turns[schedule.at_a_time])
    assert chosen.schedule.at_a_time == 1
    assert [Schedule(False, n).turns(5) for n in (1, 2, 5, 8)] == [5, 3, 1, 1]


def test_no_forward_is_built_that_the_budget_does_not_last_for(monkeypatch):
    left = iter([4.0, 2.5, 1.0])  # of a share: at the beginning, and behind each forward
    monkeypatch.setattr(schedule.Budget, "left_s", property(lambda _: next(left, 1.0)))
    built = []

    def forwards():
        for seconds in (3.0, 2.0, 1.0):
            built.append(seconds)
            yield Timed(seconds)

    monkeypatch.setattr(schedule, "_measure", lambda forward, *_: {forward.schedule: forward.seconds})
    assert choose_schedule(forwards(), EXAMPLES).seconds == 2.0
    assert built == [3.0, 2.0]


def test_a_share_of_the_start_is_spent_on_schedules(monkeypatch):
    shares = []
    real = schedule.Budget.share
    monkeypatch.setattr(schedule.Budget, "share", lambda self, *args: shares.append(real(self, *args)) or shares[-1])
    choose_schedule([Apart()], EXAMPLES, schedule.Budget(4.0))
    choose_schedule([Apart()], EXAMPLES, schedule.Budget(600.0))
    assert 1.0 < shares[0].seconds <= 2.0
    assert shares[1].seconds == schedule.BUDGET_S


def test_what_has_no_rival_is_not_run(monkeypatch):
    monkeypatch.setattr(schedule, "time_block", lambda *args, **kwargs: pytest.fail("it was measured"))
    chosen = choose_schedule([Timed(1.0)], EXAMPLES)
    assert (chosen.schedule, chosen.kept) == (Schedule(True, 1), True)


def test_none_is_refused():
    with pytest.raises(ValueError, match="expected at least one forward"):
        choose_schedule([], EXAMPLES)
