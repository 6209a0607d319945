"""Steps are recognised in every spelling, and in no other."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.unit.execution.cpu.test_networks import Residual, build_members
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.patterns import (
    ConvolveCall,
    LinearCall,
    MaxPool,
    activation_name,
    flattens_examples,
    is_addition,
    only_reshapes,
    output_node,
    pools_to_means,
)
from vmap_ensemble.execution.graph.steps import convolve, convolve_add


class Step(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x)


def trace(step):
    traced = fx.symbolic_trace(Step(step))
    return next(node for node in traced.graph.nodes if node.op.startswith("call")), traced


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (nn.MaxPool2d(3, 2, 1), (3, 2, 1, 1, False)),
        (nn.MaxPool2d((2, 3), ceil_mode=True), ((2, 3), (2, 3), 0, 1, True)),
        (lambda x: F.max_pool2d(x, 2), (2, 2, 0, 1, False)),
        (lambda x: F.max_pool2d(x, kernel_size=3, stride=2, dilation=2), (3, 2, 0, 2, False)),
        (lambda x: torch.max_pool2d(x, 3, 1, 1), (3, 1, 1, 1, False)),
        (nn.MaxPool2d(2, return_indices=True), None),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), None),
        (lambda x: F.max_pool2d(x, 2, 2, 0, 1, False, True), None),
        (nn.AvgPool2d(2), None),
        (torch.relu, None),
    ],
)
def test_max_pooling(step, expected):
    node, root = trace(step)
    found = MaxPool.of(node, root)
    assert found == (None if expected is None else MaxPool(*expected))
    if found is not None:
        x = torch.randn(1, 2, 9, 9)
        assert torch.equal(F.max_pool2d(x, *found), root(x))


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (nn.ReLU(), "relu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu_(), "relu"),
        (nn.ReLU6(), "hardtanh"),
        (F.silu, "swish"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), None),
        (lambda x: x.sigmoid(), None),
    ],
)
def test_activations(step, name):
    assert activation_name(*trace(step)) == name


@pytest.mark.parametrize(
    ("step", "flattens", "reshapes"),
    [
        (nn.Flatten(), True, True),
        (nn.Flatten(0), False, True),
        (lambda x: torch.flatten(x, 1), True, True),
        (lambda x: x.flatten(start_dim=1), True, True),
        (lambda x: x.flatten(1, 2), False, True),
        (lambda x: x.flatten(), False, True),
        (lambda x: x.permute(0, 1), False, True),
        (lambda x: x.reshape(2, -1), False, True),
        (torch.relu, False, False),
    ],
)
def test_reshaping(step, flattens, reshapes):
    node, root = trace(step)
    assert flattens_examples(node, root) is flattens
    assert only_reshapes(node, root) is reshapes


@pytest.mark.parametrize(
    ("step", "expected"), [(lambda x: x + 1, True), (lambda x: x.add_(1), True), (lambda x: x * 2, False)]
)
def test_sums(step, expected):
    assert is_addition(trace(step)[0]) is expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [(nn.AdaptiveAvgPool2d(1), True), (nn.AdaptiveAvgPool2d((1, 1)), True), (nn.AdaptiveAvgPool2d((None, 1)), False)],
)
def test_means_of_channels(step, expected):
    assert pools_to_means(*trace(step)) is expected


def test_calls_are_read_and_written_back():
    _, members = build_members(Residual, 2)
    lowered = lower_model(Residual().eval(), members)
    found = {node: ConvolveCall.of(node) for node in lowered.nodes()}
    calls = {node: call for node, call in found.items() if call is not None}
    assert [node.target for node in calls] == [convolve, convolve_add, convolve, convolve_add]
    for node, call in calls.items():
        before = (node.target, list(node.args))
        call.write(node)
        assert (node.target, list(node.args)) == before
    assert [call.settings.stride[0] for call in calls.values()].count(2) == 2
    (linear,) = [call for call in (LinearCall.of(node, lowered) for node in lowered.nodes()) if call is not None]
    assert (linear.joined, linear.has_plain_bias(lowered)) == (False, True)
    assert output_node(lowered.graph).args[0].target is F.linear
