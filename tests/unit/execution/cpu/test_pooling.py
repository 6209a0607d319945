"""Pooling by cheaper steps gives the same values, and other pooling is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from vmap_ensemble.execution.cpu.pooling import halve, replace_pools


class Pool(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x)


def replace(pool):
    traced = fx.symbolic_trace(Pool(pool))
    (node,) = [node for node in traced.graph.nodes if node.op in ("call_module", "call_function")]
    replace_pools(traced, [node])
    traced.graph.lint()
    traced.recompile()
    return traced, node.target


@pytest.mark.parametrize("sides", [(8, 8), (2, 6), (7, 8), (8, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [2, 3])
def test_halve_equals_max_pooling(sides, dtype, memory_format, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *sides).to(dtype).contiguous(memory_format=memory_format)
    before = x.clone()
    expected = F.max_pool2d(x, kernel, 2, (kernel - 1) // 2)
    got = halve(x, kernel)
    assert torch.equal(got, expected)
    assert torch.equal(x, before)
    assert torch.equal(halve(x[0], kernel), expected[0])
    x[0, 0] = torch.nan
    assert torch.equal(halve(x, kernel).isnan(), F.max_pool2d(x, kernel, 2, (kernel - 1) // 2).isnan())


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(3, 2, 1), halve),
        (nn.MaxPool2d(2), halve),
        (nn.MaxPool2d((2, 2), padding=(0, 0)), halve),
        (lambda x: F.max_pool2d(x, 2), halve),
        (lambda x: F.max_pool2d(x, kernel_size=(3, 3), stride=2, padding=1), halve),
        (nn.AdaptiveAvgPool2d(1), torch.mean),
        (nn.AdaptiveAvgPool2d((1, 1)), torch.mean),
        (nn.MaxPool2d(3, 2), "pool"),
        (nn.MaxPool2d((2, 3)), "pool"),
        (nn.MaxPool2d(2, stride=1), "pool"),
        (nn.MaxPool2d(2, dilation=2), "pool"),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "pool"),
        (nn.AdaptiveAvgPool2d((1, 2)), "pool"),
        (nn.AdaptiveAvgPool2d((None, 1)), "pool"),
        (lambda x: F.max_pool2d(x, 2, ceil_mode=True), F.max_pool2d),
        (lambda x: F.max_pool2d(x, 3, None, 1), F.max_pool2d),
    ],
)
def test_known_pools_are_replaced_and_others_left(pool, expected):
    traced, target = replace(pool)
    assert target == expected
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(traced(x), pool(x), rtol=0, atol=1e-6)
