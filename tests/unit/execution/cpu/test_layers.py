"""A kernel is added with one object from outside the package; what kernels have against layers is counted."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.unit.execution.cpu.test_networks import APART, Deep, Flat, assert_equal, build_members, joint, run_loop
from vmap_ensemble.execution.cpu import pack_convolutions, pack_linears
from vmap_ensemble.execution.cpu.layers import ConvolutionKernel, LinearKernel, Tally
from vmap_ensemble.execution.cpu.networks import prepare
from vmap_ensemble.execution.graph import values


def multiply_pixels(x, weight, bias, activation):
    """A 1x1 convolution as a product of matrices."""
    y = torch.einsum("bchw,oc->bohw", x, weight) + bias[:, None, None]
    calls.append(tuple(weight.shape))
    return F.relu(y) if activation == "relu" else y


calls = []


class Pixels(ConvolutionKernel):
    name = "pixels"
    fresh = (multiply_pixels,)

    def reasons_against(self, layer):
        reasons = [] if list(layer.shape[2:]) == [1, 1] else ["not 1x1"]
        return reasons if layer.settings.groups == 1 else [*reasons, "grouped"]

    def pack(self, layer, weight):
        return weight[:, :, 0, 0].clone()

    def step(self, layer, call, packed, *, in_place, halved):
        return multiply_pixels, (call.x, packed, call.bias, call.activation)


class Mixed(nn.Module):
    """Two 1x1 convolutions behind one of 3x3 pixels, and a grouped one."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 5, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x):
        return self.last(self.grouped(F.relu(self.mix(F.relu(self.stem(x)))))).mean((2, 3))


def test_a_convolution_kernel_from_outside_is_asked_and_used(monkeypatch):
    kernels = [Pixels(), *pack_convolutions.CONVOLUTION_KERNELS]
    monkeypatch.setattr(pack_convolutions, "CONVOLUTION_KERNELS", kernels)
    models, members = build_members(Mixed, 3)
    x = torch.randn(2, 3, 9, 9)
    forward = prepare(Mixed().eval(), members, x, schedule=APART)
    calls.clear()
    assert_equal(forward(x), run_loop(models, x))
    assert sorted(calls) == sorted([(8, 6), (5, 8)] * 3)
    assert "pixels: 2 of 4 layers (1 not 1x1, 1 grouped)" in forward.reason
    assert "onednn: 2 of 2 layers" in forward.reason


def multiply_doubled(x, weight, bias):
    """As a linear layer, on weights that were doubled when they were packed."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT, alpha=0.5)


class Doubled(LinearKernel):
    name = "doubled"

    def reasons_against(self, layer):
        return [] if layer.joined and layer.large else ["small"]

    def pack(self, layer, weight):
        return [2 * weight]

    def step(self, layer, call, packed, activation):
        assert activation == "none"  # it said that it knows no other
        return multiply_doubled, (call.x, packed, call.bias)


def test_a_linear_kernel_from_outside_is_asked_and_used(monkeypatch):
    monkeypatch.setattr(values, "MIN_LINEAR_WEIGHTS", 16 * 288)
    monkeypatch.setattr(pack_linears, "LINEAR_KERNELS", [Doubled(), *pack_linears.LINEAR_KERNELS])
    models, members = build_members(Flat, 2)
    x = torch.randn(3, 1, 14, 14)
    forward = prepare(Flat().eval(), members, x, schedule=joint(members))
    assert_equal(forward(x), run_loop(models, x))
    assert "[doubled: 1 of 2 layers (1 small), onednn: 0 of 1 layers (1 small)]" in forward.reason


def test_a_layer_that_no_kernel_takes_stays_plain(monkeypatch):
    class Never(Pixels):
        def reasons_against(self, layer):
            return ["never"]

    monkeypatch.setattr(pack_convolutions, "CONVOLUTION_KERNELS", [Never()])
    models, members = build_members(Deep, 2)
    x = torch.randn(2, 3, 12, 12)
    forward = prepare(Deep().eval(), members, x, schedule=APART)
    assert_equal(forward(x), run_loop(models, x))
    assert "0 of them on prepacked weights [pixels: 0 of 4 layers (4 never)]" in forward.reason


def test_the_first_reason_of_each_layer_is_counted():
    tally = Tally()
    answers = [["not 3x3", "strided"], [], ["strided"], ["not 3x3"]]
    assert [tally.note("winograd", reasons) for reasons in answers] == [False, True, False, False]
    assert tally.note("onednn", [])
    assert str(tally) == "winograd: 1 of 4 layers (2 not 3x3, 1 strided), onednn: 1 of 1 layers"
