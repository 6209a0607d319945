"""The proof accepts the right forward and refuses wrong ones."""

from __future__ import annotations

import pytest
import torch

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.core.proof import default_tolerance, prove_equal
from vmap_ensemble.errors import LoadError
from vmap_ensemble.models.mnist import MnistNet


@pytest.fixture
def forward(make_model):
    states = {f"m{i}": make_model(MnistNet, i).state_dict() for i in range(2)}
    return EnsembleForward(MnistNet().eval(), stack_members(states))


X = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_right_forward_is_accepted(forward):
    proof = prove_equal(forward, forward, (X,))
    assert 0 <= proof.largest_difference < 1e-5
    assert proof.argmax_agreement == 1
    assert proof.tolerance == 1e-4
    assert proof.not_finite == ()


def test_wrong_member_is_named(forward):
    with pytest.raises(LoadError, match=r"member 'm0'.*refusing to serve"):
        prove_equal(forward, lambda x: forward(x).flip(0), (X,))


def test_difference_is_measured(forward):
    proof = prove_equal(forward, lambda x: forward.loop(x) * 1.01, (X,), tolerance=0.02)
    assert proof.largest_difference == pytest.approx(0.01, rel=1e-3)


def test_nan_of_the_vmapped_forward_is_refused(forward):
    with pytest.raises(LoadError, match="m0"):
        prove_equal(forward, lambda x: forward(x) * float("nan"), (X,), tolerance=1e9)


def test_wrong_shape_is_refused(forward):
    with pytest.raises(LoadError, match=r"\(2, 10\).*\(2, 9\)"):
        prove_equal(forward, lambda x: forward(x)[..., :9], (X,))


def test_wrong_structure_is_refused(forward):
    with pytest.raises(LoadError, match="expected 1 outputs, got 2"):
        prove_equal(forward, lambda x: (forward(x), forward(x)), (X,))


def test_members_that_are_not_finite_are_named(make_model):
    states = {f"m{i}": make_model(MnistNet, i).state_dict() for i in range(2)}
    states["m1"]["fc2.bias"][0] = float("nan")
    forward = EnsembleForward(MnistNet().eval(), stack_members(states))
    assert prove_equal(forward, forward, (X,)).not_finite == ("m1",)


@pytest.mark.parametrize(
    ("convolutions", "products", "device", "bound"),
    [
        pytest.param(False, "highest", "cuda", 1e-4, id="float32 on a GPU"),
        pytest.param(True, "highest", "cuda", 2e-2, id="convolutions in TF32"),
        pytest.param(False, "high", "cuda", 2e-2, id="products in TF32"),
        pytest.param(True, "high", "cpu", 1e-4, id="a CPU has no TF32"),
    ],
)
def test_tf32_where_it_is_admitted_gets_its_own_bound(monkeypatch, convolutions, products, device, bound):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products)
    assert default_tolerance(torch.float32, torch.device(device)) == bound
    assert default_tolerance(torch.bfloat16, torch.device(device)) == 1e-1
