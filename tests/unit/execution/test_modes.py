"""Every mode gives the loop's values, or says why it can't be had; `auto` is never slower than the loop."""

import json
import logging
import shutil
import threading

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.execution import auto, readings, timing
from vmap_ensemble.execution import modes as execution
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.compiled.packages import CompiledForward
from vmap_ensemble.execution.cpu import onednn
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.modes import ExecutionOptions

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


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


EXAMPLES = [(torch.randn(1, 1, 8, 8),), (torch.randn(3, 1, 8, 8),)]
SHORT = ExecutionOptions(budget_s=5.0)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("mode", ["reference", "eager", "prepared", "auto"])
def test_values_are_the_loops(mode, count):
    forward = build_forward(count)
    run = build_execution(mode, forward, EXAMPLES, SHORT)
    for args in EXAMPLES:
        torch.testing.assert_close(run(*args), forward.loop(*args), rtol=1e-5, atol=1e-6)


def test_a_named_mode_is_what_serves():
    run = build_execution("reference", build_forward(), EXAMPLES)
    assert (run.name, run.reason, run.candidates[0].difference) == ("reference", "asked for", 0.0)


def test_compiled_is_compile_of_vmap_where_that_makes_no_grouped_convolutions(monkeypatch):
    compiled, sizes = [], []

    def compile_(function):
        compiled.append(function)
        return lambda x: sizes.append(len(x)) or function(x)

    monkeypatch.setattr(torch, "compile", compile_)
    forward = build_forward(2, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    run = build_execution("compiled", forward, EXAMPLES)
    assert sizes[:2] == [1, 3]  # at load, so that no request waits for a compiler
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled[0](*EXAMPLES[0]), forward(*EXAMPLES[0]))
    assert len(compiled) == 1


def test_compiled_on_a_gpu_is_compile_of_vmap(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr(execution, "device_of", lambda forward: torch.device("cuda"))
    build_execution("compiled", build_forward(), EXAMPLES)
    assert len(compiled) == 1


def test_the_loop_of_a_model_that_can_not_be_copied_swaps_weights(caplog):
    class Locked(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    forward = build_forward(2, Locked)
    run = build_execution("reference", forward, EXAMPLES)
    assert "the loop swaps weights: Locked can't be copied" in caplog.text
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=0, atol=0)


def test_compiled_encoders_run_on_plain_weights(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, **sizes)
    states = [BertForSequenceClassification(config).state_dict() for _ in range(2)]
    members = StackedMembers(("a", "b"), {key: torch.stack([s[key] for s in states]) for key in states[0]}, {})
    forward = build_encoder_forward(BertForSequenceClassification(config).eval(), members)
    args = torch.randint(5, 50, (2, 4)), torch.ones(2, 4, dtype=torch.long)
    asked = []
    monkeypatch.setattr(onednn, "LINEAR", lambda *args: asked.append(args))
    run = build_execution("compiled", forward, [args])
    torch.testing.assert_close(run(*args).logits, forward.loop(*args).logits, rtol=1e-5, atol=1e-6)
    assert (len(compiled), asked) == (1, [])
    assert forward.rules()._prepacked  # the members' own forward keeps its


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_convolutions_are_native_code_of_unrolled_members():
    forward = build_forward()
    run = build_execution("compiled", forward, EXAMPLES[:1])  # one size: compiling takes long
    assert isinstance(run.run, CompiledForward)
    assert [(package.smallest, package.largest) for package in run.run.packages] == [(1, 1)]
    for batch in (1, 3):
        x = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-5, atol=1e-6)


def fail_to_compile(*args):
    raise RuntimeError("no C++ compiler\nmore lines")


def test_compiling_that_was_asked_for_and_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(execution, "compile_here", fail_to_compile)
    with pytest.raises(LoadError, match=r"execution 'compiled' can't be had: RuntimeError: no C\+\+ compiler$"):
        build_execution("compiled", build_forward(), EXAMPLES)


def test_compiling_that_fails_under_auto_is_listed_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(execution, "compile_here", fail_to_compile)
    monkeypatch.setattr(auto, "COMPILE_NEEDS_S", 0.0)
    with caplog.at_level(logging.INFO):
        run = build_execution("auto", build_forward(), EXAMPLES, ExecutionOptions(budget_s=5.0))
    refused = {candidate.name: candidate.refused for candidate in run.candidates if candidate.refused}
    assert refused == {"compiled": "execution 'compiled' can't be had: RuntimeError: no C++ compiler"}
    assert "execution 'compiled' is not a candidate" in caplog.text


def test_auto_starts_no_compilation_it_has_no_time_for(monkeypatch):
    monkeypatch.setattr(execution, "compile_here", fail_to_compile)
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
    monkeypatch.setattr(auto, "time_call", timed)
    monkeypatch.setattr(timing, "time_call", timed)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)


def fix_times(monkeypatch, times_s):
    """Replace the clock, whose readings a busy machine spoils: mode -> seconds, or batch size -> seconds."""
    real = execution.build_mode

    def timed(run, args):
        found = times_s.get(getattr(run, "name", None), 0.001)
        return run(*args), found[args[0].shape[0]] if isinstance(found, dict) else found

    monkeypatch.setattr(execution, "build_mode", lambda name, *rest: Named(name, real(name, *rest)))
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
    real = execution.build_mode
    monkeypatch.setattr(
        execution,
        "build_mode",
        lambda name, *rest: (lambda *args: real(name, *rest)(*args) * 1.01) if name == "eager" else real(name, *rest),
    )
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
    monkeypatch.setattr(auto, "library_name", lambda: asked.append(1))
    monkeypatch.setattr(auto, "has_convolutions", lambda model: convolves)
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
    chosen = Schedule(joint=True, at_a_time=1)
    monkeypatch.setattr(Named, "schedule", chosen, raising=False)
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path)
    build_execution("auto", build_forward(), EXAMPLES, options)
    asked, real = [], execution.build_prepared

    def build(model, members, examples, schedule):
        asked.append(schedule)
        return real(model, members, examples, schedule=Schedule(joint=False, at_a_time=1))

    monkeypatch.setattr(execution, "build_prepared", build)
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

    monkeypatch.setattr(execution, "build_prepared", refuse)
    again = build_execution("auto", build_forward(), EXAMPLES, options)
    assert again.name in ("reference", "eager")
    assert [candidate.refused for candidate in again.candidates if candidate.name == "prepared"] == ["not today"]


def test_an_unwritable_cache_folder_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    options = ExecutionOptions(budget_s=5.0, cache_dir=tmp_path / "file")
    run = build_execution("auto", build_forward(), EXAMPLES, options)
    assert run.name in execution.MODES
    assert "can't be stored" in caplog.text


def test_an_unknown_mode_is_refused():
    with pytest.raises(SettingsError, match=r"execution: expected one of reference, eager, .*, got 'fast'"):
        build_execution("fast", build_forward(), EXAMPLES)


def test_no_example_is_refused():
    with pytest.raises(LoadError, match="expected at least one example"):
        build_execution("auto", build_forward(), [])


def test_prepared_without_convolutions_is_refused_if_asked_for():
    forward = build_forward(2, lambda: nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(LoadError, match="Sequential has no 2-d convolution"):
        build_execution("prepared", forward, [(torch.randn(1, 4),)])


def test_cudagraph_is_refused_on_a_cpu():
    with pytest.raises(LoadError, match="execution 'cudagraph': expected the members on a CUDA device, got cpu"):
        build_execution("cudagraph", build_forward(), EXAMPLES)
