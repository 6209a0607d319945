"""Modes of a GPU by a fake recorder: their values, what they refuse, and that `auto` goes on."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution import register
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cuda import mode
from vmap_ensemble.execution.register import ExecutionOptions, find_mode

NAMES = ("cudagraph", "cudagraph_loop", "branches", "compiled_branches")
EXAMPLES = [(torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)),) for batch in (2, 5)]
SHORT = ExecutionOptions(budget_s=5.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Waiting(nn.Linear):
    """Gives its values, but not before the host has seen one of the input's."""

    def forward(self, x):
        return super().forward(x.flatten(1) if x.sum().item() > -1e9 else -x.flatten(1))


def make_forward(build, count=2):
    states = {}
    for seed in range(count):
        torch.manual_seed(seed)
        states[f"m{seed}"] = build().state_dict()
    return EnsembleForward(build().eval(), stack_members(states))


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch):
    """The modes take this machine for theirs."""
    monkeypatch.setattr(mode, "CudaRecorder", FakeRecorder)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    for name in NAMES:
        monkeypatch.setitem(register._MODES, name, dataclasses.replace(find_mode(name), devices=None))


def test_auto_refuses_what_can_not_be_recorded_and_goes_on():
    forward = make_forward(lambda: Waiting(192, 3))
    run = build_execution("auto", forward, EXAMPLES, SHORT)
    refused = {candidate.name: candidate.refused for candidate in run.candidates}
    assert refused["cudagraph"].startswith("the recorded forward fails: RuntimeError: operation not permitted when")
    assert refused["eager"] is None
    assert run.name not in NAMES
    torch.testing.assert_close(run(*EXAMPLES[0]), forward.loop(*EXAMPLES[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_loops(name, count):
    forward = make_forward(Net, count)
    run = build_execution(name, forward, EXAMPLES)
    for batch in (1, 3, 8, 70):  # the last one is larger than any recording
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-5, atol=1e-6)


def test_auto_measures_each_way_and_says_so():
    run = build_execution("auto", make_forward(Net), EXAMPLES, ExecutionOptions(budget_s=60.0))
    measured = {candidate.name for candidate in run.candidates if len(candidate.latency_ms) == 2}
    slow = {candidate.name for candidate in run.candidates if len(candidate.latency_ms) == 1}
    assert set(NAMES) <= measured | slow
    assert not [row.refused for row in run.candidates if row.name in NAMES and row.refused]


@pytest.mark.parametrize("faster", [False, True])
def test_branches_take_the_faster_memory_format_and_measure_it_once(monkeypatch, faster):
    timed = []

    def time_block(run, _args, _about_s):
        timed.append(run.lay_out.channels_last)
        return 0.1 if timed[-1] == faster else 0.2

    monkeypatch.setattr(mode, "time_block", time_block)
    forward = make_forward(Net)
    built = find_mode("branches").build(forward, EXAMPLES, SHORT)
    assert (sorted(timed), built.channels_last, built.schedule) == ([False, True], faster, {"channels_last": faster})
    again = find_mode("branches").build(forward, EXAMPLES, dataclasses.replace(SHORT, schedule=built.schedule))
    assert (len(timed), again.channels_last, again.run.lay_out.channels_last) == (2, faster, faster)


def test_no_memory_format_is_measured_without_convolutions(monkeypatch):
    monkeypatch.setattr(mode, "time_block", lambda *_: pytest.fail("measured"))
    forward = make_forward(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    assert find_mode("branches").build(forward, EXAMPLES, SHORT).schedule == {"channels_last": False}


def test_branches_are_compiled_for_the_examples_alone(monkeypatch):
    sizes = []

    def compile_(step, **_):
        def run(shared, state):
            sizes.append(len(shared["x"]))
            return step(shared, state)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    forward = make_forward(Net)
    run = find_mode("compiled_branches").build(forward, EXAMPLES, SHORT).run
    assert set(sizes) == {2, 8}  # at load
    sizes.clear()
    for batch, expected in ((1, {2}), (7, {8}), (9, set())):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-5, atol=1e-6)
        assert set(sizes) == expected
        sizes.clear()


def test_a_forward_that_does_more_than_its_model_is_not_compiled_but_branches():
    class More(EnsembleForward):
        one_vmap = None

    forward = make_forward(Net)
    more = More(Net().eval(), forward.members)
    with pytest.raises(LoadError, match="execution 'compiled_branches': More does more than its model"):
        build_execution("compiled_branches", more, EXAMPLES)
    run = build_execution("branches", more, EXAMPLES)
    torch.testing.assert_close(run(*EXAMPLES[0]), forward.loop(*EXAMPLES[0]), rtol=1e-5, atol=1e-6)
