"""Branches equal the loop for any architecture, whoever runs them beside each other."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.execution.cuda.branches import Branches, take_apart


class Branching(nn.Module):
    """No graph of it can be traced: its path depends on a value."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return {"y": y if y.abs().sum() > 0 else -y}


class Whole(nn.Module):
    """torch.fx can't trace it, since it loops over rows; a compiler can."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.stack([self.conv(row).mean((1, 2)) for row in x])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(2).mean(-1).view(x.size(0), -1))


def make(build, seeded, count, shared=()):
    states = {f"m{seed}": dict(seeded(build, seed).state_dict()) for seed in range(count)}
    for key in shared:
        for state in states.values():
            state[key] = states["m0"][key]
    return EnsembleForward(build().eval(), stack_members(states))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("build", [Small, Branching])
def test_branches_equal_the_loop(make_model, build, count, channels_last):
    forward, recorder = make(build, make_model, count), FakeRecorder()
    branches = Branches(take_apart(forward, channels_last), recorder)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(branches(x), forward.loop(x), rtol=1e-5, atol=1e-5)
    assert recorder.lanes == [count, count]


def test_a_network_of_many_layers(make_model):
    forward = make(lambda: resnet18(num_classes=7), make_model, 2)
    x = torch.randn(2, 3, 64, 64)
    branches = Branches(take_apart(forward, channels_last=True), FakeRecorder())
    with torch.inference_mode():
        torch.testing.assert_close(branches(x), forward.loop(x), rtol=1e-4, atol=1e-4)


def test_what_members_share_runs_once(make_model, monkeypatch):
    trunk = [f"{layer}.{key}" for layer in ("conv", "norm") for key in getattr(Small(), layer).state_dict()]
    forward = make(Small, make_model, 3, trunk)
    convolutions = []
    real = nn.functional.conv2d
    branches = Branches(take_apart(forward), FakeRecorder())
    monkeypatch.setattr(nn.functional, "conv2d", lambda *args: convolutions.append(1) or real(*args))
    x = torch.randn(2, 3, 9, 9)
    ours = branches(x)
    assert len(convolutions) == 1
    torch.testing.assert_close(ours, forward.loop(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [Small, Whole])
def test_one_graph_is_compiled_for_all_members(make_model, monkeypatch, build):
    graphs = []
    real = torch.compile
    backend = lambda graph, _inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda step, **given: real(step, backend=backend, fullgraph=True, **given))
    forward = make(build, make_model, 3)
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        ours = Branches(take_apart(forward).compiled(), FakeRecorder())(x)
        torch.testing.assert_close(ours, forward.loop(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_members_that_are_all_the_same(make_model):
    forward = make(Small, make_model, 2, Small().state_dict())
    x = torch.randn(2, 3, 9, 9)
    ours = Branches(take_apart(forward), FakeRecorder())(x)
    assert ours.shape == (2, 2, 5)
    torch.testing.assert_close(ours, forward.loop(x), rtol=1e-5, atol=1e-5)
