"""Modes of a GPU by a fake recorder: their values, what they refuse, and that `auto` goes on."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.execution import register
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cuda import mode
from vmap_ensemble.execution.register import ExecutionOptions, find_mode

NAMES = ("cudagraph",)
EXAMPLES = [(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)]


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
    for name in NAMES:
        monkeypatch.setitem(register._MODES, name, dataclasses.replace(find_mode(name), devices=None))


def test_auto_refuses_what_can_not_be_recorded_and_goes_on():
    forward = make_forward(lambda: Waiting(192, 3))
    run = build_execution("auto", forward, EXAMPLES, ExecutionOptions(budget_s=5.0))
    refused = {candidate.name: candidate.refused for candidate in run.candidates}
    assert refused["cudagraph"].startswith("the recorded forward fails: RuntimeError: operation not permitted when")
    assert refused["eager"] is None
    assert run.name not in NAMES
    torch.testing.assert_close(run(*EXAMPLES[0]), forward.loop(*EXAMPLES[0]), rtol=1e-5, atol=1e-6)
