"""The unrolled forward gives the loop's values, without grouped convolutions; native code of it is compiled here."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.execution.compiled.native_code import reasons_against
from vmap_ensemble.execution.compiled.unrolled import UnrolledGraph, UnrolledModules, unroll


class Residual(nn.Module):
    """Batch norm that folds and one that doesn't, a residual, sizes taken from the input, a head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.after, self.fc = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        y = self.after(F.relu(self.second(y) + y))
        return self.fc(y.mean((2, 3)).reshape(x.size(0), -1))


class Branching(Residual):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] > 1 else super().forward(x.expand(-1, -1, 2, 2))


class Two(Residual):
    def forward(self, x):
        return {"logits": super().forward(x), "input": x}


def build(make, count, shared=lambda key: False):
    torch.manual_seed(count)
    states = [make().state_dict() for _ in range(count)]
    for state in states:
        for key, tensor in state.items():
            if "running_var" in key:
                tensor.uniform_(0.5, 2.0)
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0] if not shared(key)}
    common = {key: tensor for key, tensor in states[0].items() if shared(key)}
    names = tuple(f"m{index}" for index in range(count))
    return EnsembleForward(make().eval(), StackedMembers(names=names, stacked=stacked, shared=common))


X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def count_calls(module, monkeypatch):
    """Convolutions of one run: how many examples' worth of filters each has, and into how many groups."""
    seen = []
    real = F.conv2d

    def conv2d(x, weight, bias, stride, padding, dilation, groups):
        seen.append(groups)
        return real(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(F, "conv2d", conv2d)
    with torch.no_grad():
        module(X)
    return seen


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", [UnrolledGraph, UnrolledModules])
def test_values_are_the_loops(kind, count):
    forward = build(Residual if kind is UnrolledGraph else Branching, count)
    module = unroll(forward)
    assert type(module) is kind
    with torch.no_grad():
        torch.testing.assert_close(module(X), forward.loop(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_are_the_members(dtype):
    forward = build(lambda: Residual().to(dtype), 2)
    x = X.to(dtype)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(unroll(forward)(x), forward.loop(x), rtol=tolerance, atol=tolerance)


def test_every_member_has_convolutions_of_its_own(monkeypatch):
    assert count_calls(unroll(build(Residual, 3)), monkeypatch) == [1] * 6


def test_what_members_share_is_computed_once_and_heads_are_batched(monkeypatch):
    forward = build(Residual, 3, lambda key: not key.startswith("fc"))
    module = unroll(forward)
    assert count_calls(module, monkeypatch) == [1] * 2
    with torch.no_grad():
        torch.testing.assert_close(module(X), forward.loop(X), rtol=1e-5, atol=1e-5)


def test_members_that_share_everything_are_stacked(monkeypatch):
    forward = build(Residual, 2, lambda key: True)
    module = unroll(forward)
    assert count_calls(module, monkeypatch) == [1] * 2
    with torch.no_grad():
        torch.testing.assert_close(module(X), forward.loop(X), rtol=1e-5, atol=1e-5)


def test_a_shared_first_layer_is_one_convolution(monkeypatch):
    forward = build(Residual, 3, lambda key: key.startswith(("first", "norm")))
    module = unroll(forward)
    assert count_calls(module, monkeypatch) == [1] * 4
    with torch.no_grad():
        torch.testing.assert_close(module(X), forward.loop(X), rtol=1e-5, atol=1e-5)


def test_the_models_output_structure_is_kept():
    outputs = unroll(build(Two, 2))(X)
    assert outputs["logits"].shape == (2, 3, 3)
    torch.testing.assert_close(outputs["input"], torch.stack([X, X]))


def test_a_model_that_can_not_be_traced_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        unroll(build(Branching, 2))
    assert "members are compiled whole" in caplog.text


class Own(EnsembleForward):
    one_vmap = None


def test_why_native_code_can_not_be_made():
    forward = build(Residual, 2)
    assert reasons_against(forward, (X,)) == []
    assert reasons_against(forward, (X, X)) == ["its model takes more than one tensor"]
    assert reasons_against(build(Two, 2), (X,)) == ["its model gives more than one tensor"]
    own = Own(Residual().eval(), forward.members)
    assert reasons_against(own, (X,)) == ["Own is more than one call of vmap"]
