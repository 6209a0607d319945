"""`auto` keeps the fastest way, is never slower than the loop, and refuses whatever fails with its reason."""

import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from vmap_ensemble.archive.modes import MODULES, mode_names
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution import auto, modes, readings, register, timing
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.compiled import mode as compiled_mode
from vmap_ensemble.execution.cpu import mode as cpu_mode
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.register import Built, ExecutionOptions


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def build_forward(count=2, make=Net):
    torch.manual_seed(0)
    states = [make().state_dict() for _ in range(count)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    members = StackedMembers(names=tuple(f"m{i}" for i in range(count)), stacked=stacked, shared={})
    return EnsembleForward(make().eval(), members)


torch.manual_seed(0)  # a model here branches on the sum of its input
EXAMPLES = [(torch.randn(1, 1, 8, 8),), (torch.randn(3, 1, 8, 8),)]
SHORT = ExecutionOptions(budget_s=5.0)
ENGINES = ("onnxruntime", "openvino")


def fail_to_compile(*args):
    raise RuntimeError("no C++ compiler\nmore lines")


def test_compiling_that_fails_under_auto_is_listed_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(compiled_mode, "compile_here", fail_to_compile)
    monkeypatch.setattr(compiled_mode, "COMPILE_NEEDS_S", 0.0)
    with caplog.at_level(logging.INFO):
        run = build_execution("auto", build_forward(), EXAMPLES, ExecutionOptions(budget_s=5.0))
    assert refusals(run) == {"compiled": "execution 'compiled' can't be had: RuntimeError: no C++ compiler"}
    assert "execution 'compiled' is not a candidate" in caplog.text


def test_auto_starts_no_compilation_it_has_no_time_for(monkeypatch):
    monkeypatch.setattr(compiled_mode, "compile_here", fail_to_compile)
    run = build_execution("auto", build_forward(), EXAMPLES, ExecutionOptions(budget_s=20.0))
    (compiled,) = [candidate for candidate in run.candidates if candidate.name == "compiled"]
    assert compiled.refused.startswith("needs 60 s of the budget, ")


class Named:
    """A run that knows its mode, so that the clock below can tell it from others."""

    def __init__(self, name, run):
        self.name, self.run = name, run

    def __call__(self, *args):
        return self.run(*args)


def replace_clock(monkeypatch, timed):
    monkeypatch.setattr(timing.Budget, "left_s", property(lambda budget: budget.seconds))  # no time passes
    monkeypatch.setattr(auto, "time_call", timed)
    monkeypatch.setattr(timing, "time_call", timed)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "BLOCK_S", 0.0)  # one call a block, since all of them take the same by this clock
    monkeypatch.setattr(auto, "MAX_ROUNDS", 2)


def named(name, built):
    return dataclasses.replace(built, run=Named(name, built.run))


def fix_times(monkeypatch, times_s):
    """Replace the clock, whose readings a busy machine spoils: mode -> seconds, or batch size -> seconds."""
    real = modes.build_mode

    def timed(run, args):
        found = times_s.get(getattr(run, "name", None), 0.001)
        return run(*args), found[args[0].shape[0]] if isinstance(found, dict) else found

    monkeypatch.setattr(modes, "build_mode", lambda name, *rest: named(name, real(name, *rest)))
    replace_clock(monkeypatch, timed)


def slow_down(monkeypatch, names):
    """Make the named modes slow, so that the measured choice is known."""
    fix_times(monkeypatch, dict.fromkeys(names, 0.02))


@pytest.mark.parametrize("fastest", ["reference", "eager", "prepared"])
def test_auto_keeps_the_fastest(monkeypatch, fastest):
    fix_times(monkeypatch, dict.fromkeys({"reference", "eager", "prepared"} - {fastest}, 0.0014))
    run = build_execution("auto", build_forward(), EXAMPLES, SHORT)
    assert run.name == fastest
    rows = {candidate.name: candidate for candidate in run.candidates}
    measured = [name for name, row in rows.items() if row.latency_ms]
    assert measured == ["reference", "prepared", "eager"]
    assert all(len(rows[name].latency_ms) == 2 for name in measured)
    assert min(measured, key=lambda name: sum(rows[name].latency_ms)) == fastest
    assert ("than the loop" if fastest == "reference" else "the speed of the loop") in run.reason


def test_auto_keeps_the_loop_if_the_other_is_slower_on_one_example(monkeypatch):
    fix_times(monkeypatch, {"reference": 0.04, "eager": {1: 0.001, 3: 0.05}, "prepared": 0.05})
    assert build_execution("auto", build_forward(), EXAMPLES, SHORT).name == "reference"


def test_a_hopeless_candidate_is_left_after_its_first_example(monkeypatch):
    calls = []
    fix_times(monkeypatch, {"reference": 0.01, "eager": 0.016, "prepared": 0.009})
    forward = build_forward()
    monkeypatch.setattr(EnsembleForward, "__call__", lambda self, x: calls.append(len(x)) or self.loop(x))
    run = build_execution("auto", forward, EXAMPLES, SHORT)
    eager = {candidate.name: candidate for candidate in run.candidates}["eager"]
    assert (run.name, set(calls)) == ("prepared", {1})
    assert (eager.latency_ms, eager.refused) == ([pytest.approx(16.0)], None)


def test_what_is_far_behind_the_best_so_far_is_left_though_the_loop_is_slower(monkeypatch):
    fix_times(monkeypatch, {"reference": 0.09, "prepared": 0.01, "eager": {1: 0.016, 3: 0.001}})
    run = build_execution("auto", build_forward(), EXAMPLES, SHORT)
    eager = {candidate.name: candidate for candidate in run.candidates}["eager"]
    assert (run.name, eager.latency_ms) == ("prepared", [pytest.approx(16.0)])


@pytest.mark.parametrize(("prepared_s", "rounds"), [(0.01, 1), (0.019, 3)])
def test_rounds_end_once_one_is_clearly_ahead(monkeypatch, prepared_s, rounds):
    fix_times(monkeypatch, {"reference": 0.02, "prepared": prepared_s, "eager": 0.04})
    monkeypatch.setattr(auto, "MAX_ROUNDS", 3)
    read = []
    real = readings.Readings.read
    monkeypatch.setattr(readings.Readings, "read", lambda self, *args: read.append(args[0]) or real(self, *args))
    assert build_execution("auto", build_forward(), EXAMPLES, SHORT).name == "prepared"
    assert sorted(read) == sorted(["reference", "prepared"] * rounds)


def test_a_large_network_is_measured_on_some_of_its_members_and_served_with_all(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    fix_times(monkeypatch, {"reference": 0.02, "prepared": 0.01, "eager": 0.04})
    built = []
    faked = modes.build_mode

    def build(name, forward, examples, options):
        schedule = options.schedule and dict(options.schedule)
        built.append((name, len(forward.members.names), options.count, schedule))
        return faked(name, forward, examples, options)

    monkeypatch.setattr(modes, "build_mode", build)
    forward = build_forward(5)
    # By the clock above the loop would take 8 times 4 examples times 0.02 s for 2 members, and so 1.6 s for 5.
    options = ExecutionOptions(budget_s=1.5, cache_dir=tmp_path)
    run = build_execution("auto", forward, EXAMPLES, options)
    assert run.name == "prepared"
    apart = {"joint": False, "at_a_time": 1}
    assert built[:3] == [("reference", 2, None, None), ("reference", 2, 5, None), ("prepared", 2, 5, None)]
    name, members, count, schedule = built[-1]
    assert (name, members, count) == ("prepared", 5, None)
    rows = {candidate.name: candidate.latency_ms for candidate in run.candidates}
    assert rows["reference"] == [pytest.approx(1e3 * 0.02 * 5 / 2)] * 2
    assert rows["prepared"] == [pytest.approx(1e3 * 0.01 * (5 / 2 if schedule == apart else 3))] * 2
    ratio = rows["reference"][0] / rows["prepared"][0]
    assert run.reason == f"fastest of 3: {ratio:.2f}x, {ratio:.2f}x the speed of the loop, on 2 of the members"
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=1e-5, atol=1e-6)
    assert dict(run.schedule) == schedule
    kept = build_execution("auto", forward, EXAMPLES, options)
    assert kept.reason == f"{run.reason} (measured at an earlier start)"


@pytest.mark.parametrize("why", ["there is time", "native code for all", "most is shared", "as many as cores"])
def test_all_members_are_measured_where_some_say_little_or_there_is_time(monkeypatch, why):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5 if why == "as many as cores" else 1)
    fix_times(monkeypatch, {"reference": 0.02})
    forward = build_forward(5)
    if why == "most is shared":
        shared = {key: forward.members.stacked.pop(key)[0] for key in list(forward.members.stacked) if "conv" in key}
        members = dataclasses.replace(forward.members, shared=shared)
        forward = EnsembleForward(Net().eval(), members)
    packed = (lambda: forward) if why == "native code for all" else None
    options = ExecutionOptions(budget_s=30.0 if why == "there is time" else 1.0, packed=packed)
    run = build_execution("auto", forward, EXAMPLES, options)
    rows = {candidate.name: candidate.latency_ms for candidate in run.candidates}
    assert rows["reference"] == [pytest.approx(20.0)] * 2
    assert "of the members" not in run.reason


def test_the_next_fastest_serves_all_members_where_the_fastest_on_some_fails_its_proof(monkeypatch, add_mode):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    add_mode("late", lambda forward, *_: Built(Late(forward, sizes=(2,))))
    fix_times(monkeypatch, {"late": 0.001, "reference": 0.02, "eager": 0.0013})
    options = ExecutionOptions(budget_s=1.0, sample=(torch.randn(2, 1, 8, 8),))
    forward = build_forward(5, flat)
    run = build_execution("auto", forward, EXAMPLES, options)
    assert run.name == "eager"
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=1e-5, atol=1e-6)


def test_a_candidate_that_runs_out_of_memory_is_refused(monkeypatch):
    def out_of_memory(self, x):
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    monkeypatch.setattr(EnsembleForward, "__call__", out_of_memory)
    run = build_execution("auto", build_forward(), EXAMPLES, SHORT)
    assert run.name in ("reference", "prepared")
    assert {c.name: c.refused for c in run.candidates}["eager"].startswith("ran out of memory on a batch")


def test_what_serves_is_proved_on_the_sample():
    sample = (torch.randn(2, 1, 8, 8),)
    for mode in ("auto", "eager"):
        sizes = []
        forward = build_forward()
        member = forward.member
        forward.member = lambda index, x, member=member, sizes=sizes: sizes.append(len(x)) or member(index, x)
        run = build_execution(mode, forward, EXAMPLES, ExecutionOptions(budget_s=5.0, sample=sample))
        assert sizes[-2:] == [2, 2]
        assert run.proof.largest_difference < 1e-5
        assert run.proof_s > 0


def test_auto_refuses_a_candidate_with_other_values(monkeypatch):
    real = EnsembleForward.__call__
    monkeypatch.setattr(EnsembleForward, "__call__", lambda self, x: real(self, x) * 1.01)
    slow_down(monkeypatch, {"reference", "prepared"})  # else it would be the fastest
    run = build_execution("auto", build_forward(), EXAMPLES, SHORT)
    rows = {candidate.name: candidate for candidate in run.candidates}
    assert run.name != "eager"
    assert "differs from the member's own by" in rows["eager"].refused


def test_the_choice_is_read_from_the_cache(monkeypatch, tmp_path):
    slow_down(monkeypatch, {"reference", "eager"})
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path / "choices", archive_sha="abc")
    forward = build_forward()
    first = build_execution("auto", forward, EXAMPLES, options)
    (path,) = (tmp_path / "choices").iterdir()
    assert json.loads(path.read_text())["name"] == first.name == "prepared"

    monkeypatch.setattr(auto.Auto, "_measure_loop", lambda self: pytest.fail("measured again"))
    again = build_execution("auto", forward, EXAMPLES, options)
    assert again.name == "prepared"
    assert again.reason == f"{first.reason} (measured at an earlier start)"
    assert again.candidates == first.candidates
    torch.testing.assert_close(again(*EXAMPLES[0]), forward.loop(*EXAMPLES[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convolves", [True, False])
def test_kernels_are_looked_for_where_they_can_serve(monkeypatch, tmp_path, convolves):
    asked = []
    monkeypatch.setattr(cpu_mode, "library_name", lambda: asked.append(1))
    monkeypatch.setattr(EnsembleForward, "has_convolutions", convolves)
    options = ExecutionOptions(budget_s=0.0, cache_dir=tmp_path)
    build_execution("auto", build_forward(), EXAMPLES[:1], options)
    assert len(asked) == convolves


def test_a_choice_of_a_busy_machine_is_measured_once_more_and_then_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(readings.Readings, "is_settled", lambda self, names: False)
    options = ExecutionOptions(budget_s=0.0, cache_dir=tmp_path)
    reasons = [build_execution("auto", build_forward(), EXAMPLES[:1], options).reason for _ in range(3)]
    assert ["earlier start" in reason for reason in reasons] == [False, False, True]


def test_the_schedule_of_a_cached_choice_is_not_measured_again(monkeypatch, tmp_path):
    slow_down(monkeypatch, {"reference", "eager"})
    chosen = Schedule(joint=True, at_a_time=2)
    real_prepared = cpu_mode.build_prepared
    monkeypatch.setattr(cpu_mode, "build_prepared", lambda *args, **_: real_prepared(*args, schedule=chosen))
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path)
    build_execution("auto", build_forward(), EXAMPLES, options)
    asked = []

    def build(model, members, examples, schedule, **_):
        asked.append(schedule)
        return real_prepared(model, members, examples, schedule=Schedule(joint=False, at_a_time=1))

    monkeypatch.setattr(cpu_mode, "build_prepared", build)
    assert build_execution("auto", build_forward(), EXAMPLES, options).name == "prepared"
    assert asked == [chosen]


@pytest.mark.parametrize("change", ["archive", "examples", "threads"])
def test_a_choice_for_something_else_is_not_used(tmp_path, change):
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path, archive_sha="abc")
    build_execution("auto", build_forward(), EXAMPLES, options)
    examples = EXAMPLES[:1] if change == "examples" else EXAMPLES
    if change == "archive":
        options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path, archive_sha="other")
    before = torch.get_num_threads()
    torch.set_num_threads(before + (change == "threads"))
    try:
        again = build_execution("auto", build_forward(), examples, options)
    finally:
        torch.set_num_threads(before)
    assert "earlier start" not in again.reason
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_cache_is_logged_and_measured_anew(tmp_path, caplog):
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path)
    build_execution("auto", build_forward(), EXAMPLES, options)
    (path,) = tmp_path.iterdir()
    path.write_text('{"key":')
    again = build_execution("auto", build_forward(), EXAMPLES, options)
    assert "can't be read, measuring again" in caplog.text
    assert "earlier start" not in again.reason
    assert json.loads(path.read_text())["name"] == again.name


def test_a_cached_choice_that_no_longer_works_is_measured_anew(monkeypatch, tmp_path):
    slow_down(monkeypatch, {"reference", "eager"})
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path)
    assert build_execution("auto", build_forward(), EXAMPLES, options).name == "prepared"

    def refuse(*args, **kwargs):
        raise LoadError("not today")

    monkeypatch.setattr(cpu_mode, "build_prepared", refuse)
    again = build_execution("auto", build_forward(), EXAMPLES, options)
    assert again.name in ("reference", "eager")
    assert [candidate.refused for candidate in again.candidates if candidate.name == "prepared"] == ["not today"]


def test_an_unwritable_cache_folder_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path / "file")
    run = build_execution("auto", build_forward(), EXAMPLES, options)
    assert run.name in mode_names()
    assert "can't be stored" in caplog.text


@pytest.fixture
def add_mode(monkeypatch):
    """Registers a mode for one test."""

    def add(name, build, **facts):
        monkeypatch.setitem(MODULES, name, build.__module__)
        monkeypatch.setitem(register._MODES, name, None)
        register.mode(name, what="a fake", place=-1, **facts)(build)

    return add


class Late:
    """The loop's values at once, until a call that raises."""

    def __init__(self, forward, calls=10**9, sizes=(), error=RuntimeError):
        self.forward, self.calls, self.sizes, self.error = forward, calls, sizes, error

    def __call__(self, x):
        self.calls -= 1
        if self.calls < 0 or len(x) in self.sizes:
            raise self.error("not now\nmore lines")
        return self.forward.loop(x)


def flat():
    """A model that nothing is prepared for."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def refusals(execution):
    """Why candidates can't serve; engines of ONNX apart, which want a graph that no archive brings here."""
    refused = {candidate.name: candidate.refused for candidate in execution.candidates if candidate.refused}
    return {name: told for name, told in refused.items() if name not in ENGINES}


@pytest.mark.parametrize(
    ("late", "error"),
    [
        pytest.param({"sizes": (3,)}, RuntimeError, id="at the second shape"),
        pytest.param({"calls": 7}, RuntimeError, id="while it is measured"),
        pytest.param({"sizes": (2,)}, RuntimeError, id="on the sample that would prove it"),
        *(
            pytest.param({"calls": 0}, error, id=f"at its first call with {error.__name__}")
            for error in (
                *(RuntimeError, KeyError, NotImplementedError, AssertionError, LoadError),
                *(torch.AcceleratorError, torch.OutOfMemoryError, MemoryError),
            )
        ),
    ],
)
def test_a_candidate_that_fails_late_is_refused_and_the_archive_loads(monkeypatch, add_mode, late, error):
    add_mode("late", lambda forward, *_: Built(Late(forward, error=error, **late)))
    fix_times(monkeypatch, {"late": 0.0001, "reference": 0.001, "eager": 0.001})
    forward = build_forward(2, flat)
    options = dataclasses.replace(SHORT, sample=(torch.randn(2, 1, 8, 8),))
    run = build_execution("auto", forward, EXAMPLES, options)
    assert run.name == "reference"
    assert "not now" in refusals(run)["late"]
    assert "\n" not in refusals(run)["late"]
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=0, atol=0)


def test_the_next_fastest_serves_where_the_fastest_fails_its_proof(monkeypatch, add_mode):
    add_mode("late", lambda forward, *_: Built(Late(forward, sizes=(2,))))
    fix_times(monkeypatch, {"late": 0.0004, "reference": 0.001, "eager": 0.0005})
    options = dataclasses.replace(SHORT, sample=(torch.randn(2, 1, 8, 8),))
    run = build_execution("auto", build_forward(2, flat), EXAMPLES, options)
    assert (run.name, list(refusals(run))) == ("eager", ["late", "prepared", "compiled"])
    assert run.reason == "fastest of 2: 2.00x, 2.00x the speed of the loop"


def test_a_candidate_that_can_not_be_built_is_refused(add_mode):
    def build(*_):
        raise KeyError("weight")

    add_mode("broken", build)
    run = build_execution("auto", build_forward(2, flat), EXAMPLES, SHORT)
    assert refusals(run)["broken"] == "execution 'broken' can't be had: KeyError: 'weight'"


def test_reasons_against_a_candidate_are_listed_before_any_work(add_mode):
    add_mode("never", lambda *_: pytest.fail("built"), reasons_against=lambda *_: ["too wide", "too deep"])
    run = build_execution("auto", build_forward(2, flat), EXAMPLES, SHORT)
    assert refusals(run)["never"] == "execution 'never': too wide; too deep"


def test_a_mode_for_another_device_is_no_candidate(add_mode):
    add_mode("elsewhere", lambda *_: pytest.fail("built"), devices=["cuda"])
    run = build_execution("auto", build_forward(2, flat), EXAMPLES, SHORT)
    names = [candidate.name for candidate in run.candidates]
    assert names == ["reference", "prepared", "eager", "compiled", *ENGINES]


def test_an_own_mode_can_be_chosen(monkeypatch, add_mode):
    add_mode("mine", lambda forward, *_: Built(forward.loop, channels_last=True))
    fix_times(monkeypatch, {"reference": 0.002, "eager": 0.002})
    run = build_execution("auto", build_forward(2, flat), EXAMPLES, SHORT)
    assert (run.name, run.channels_last) == ("mine", True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.rnn(x[:, 0])[0][:, -1])


class Branching(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("make", "why"), [(Recurrent, "Batching rule not implemented for aten::lstm"), (Branching, "control flow")]
)
def test_what_vmap_refuses_is_served_by_the_loop_which_says_so(tmp_path, make, why):
    forward = build_forward(2, make)
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path)
    run = build_execution("auto", forward, EXAMPLES, options)
    assert run.name == "reference"
    assert run.reason.startswith("no other way could be measured; prepared: ")
    assert "; eager: one call of vmap fails: RuntimeError: " in run.reason
    assert why in run.reason
    assert all(len(row.latency_ms) == (2 if row.name == "reference" else 0) for row in run.candidates)
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []  # chosen without a measurement: the next start looks again


def test_a_loop_that_fails_is_one_line(monkeypatch):
    class Wide(Net):
        def forward(self, x):
            return super().forward(x.expand(-1, 2, -1, -1))

    with pytest.raises(LoadError, match=r"^the plain loop over members fails: RuntimeError: Given groups=1, .*$"):
        build_execution("auto", build_forward(2, Wide), EXAMPLES, SHORT)


def test_one_slow_reading_of_the_loop_does_not_cost_the_usual_winner_its_measurement(monkeypatch):
    fix_times(monkeypatch, {"reference": 0.02, "eager": 0.001})
    run = build_execution("auto", build_forward(), EXAMPLES, ExecutionOptions(budget_s=0.0))
    assert run.name == "prepared"
    assert run.reason == (
        "fastest of 2: 20.00x, 20.00x the speed of the loop; not measured, since the budget was spent: eager"
    )
    assert refusals(run)["eager"] == "not measured: the budget of 0 s was spent before its turn"


def test_the_reason_for_the_loop_says_what_was_not_measured(monkeypatch):
    fix_times(monkeypatch, {"reference": 0.001, "prepared": 0.002})
    run = build_execution("auto", build_forward(), EXAMPLES, ExecutionOptions(budget_s=0.0))
    assert run.reason == (
        "no candidate was faster than the loop on every example; not measured, since the budget was spent: eager"
    )


def test_the_first_that_can_be_had_is_measured_where_the_usual_winner_can_not(monkeypatch):
    fix_times(monkeypatch, {"reference": 0.02})
    forward = build_forward(2, flat)
    run = build_execution("auto", forward, EXAMPLES, ExecutionOptions(budget_s=0.0))
    assert run.name == "eager"
    assert run.reason == "fastest of 2: 20.00x, 20.00x the speed of the loop"


def test_the_others_serve_where_a_folder_is_left_out(monkeypatch):
    for name in ("prepared", "compiled", "cudagraph"):
        monkeypatch.setitem(MODULES, name, "vmap_ensemble.execution.left_out.mode")
        monkeypatch.delitem(register._MODES, name, raising=False)
    run = build_execution("auto", build_forward(), EXAMPLES, SHORT)
    assert run.name in ("eager", "reference")
    assert set(refusals(run)) == {"prepared", "compiled", "cudagraph"}
    assert "ModuleNotFoundError: No module named" in refusals(run)["prepared"]
    assert build_execution("eager", build_forward(), EXAMPLES).name == "eager"
