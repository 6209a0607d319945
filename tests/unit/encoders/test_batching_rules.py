"""Each rule against the stock rule of vmap, for every way its arguments can be batched."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from vmap_ensemble.encoders import batching_rules
from vmap_ensemble.encoders.batching_rules import FEW_ROWS, RULES, FastRules


def compare(function, arguments, in_dims, rules=None, tolerance=1e-5):
    expected = vmap(function, in_dims=in_dims)(*arguments)
    with rules or FastRules():
        got = vmap(function, in_dims=in_dims)(*arguments)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    return got


def draw(members, shape, batched):
    return torch.randn(*(members,) * batched, *shape)


def ways(count):
    return [way for way in itertools.product([True, False], repeat=count) if any(way)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("way", ways(2))
def test_embedding_equals_stock(members, way):
    ids = torch.randint(0, 11, (*(members,) * way[0], 3, 4))
    table = draw(members, (11, 6), way[1])
    dims = tuple(0 if own else None for own in way)
    got = compare(lambda i, t: F.embedding(i, t, padding_idx=0), (ids, table), dims, tolerance=0)
    assert torch.equal(got[0], F.embedding(ids[0] if way[0] else ids, table[0] if way[1] else table))


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("way", ways(3))
@pytest.mark.parametrize("rows", [(7,), (2, 3), (1, 100)])
def test_linear_equals_stock(members, way, rows):
    arguments = [draw(members, shape, own) for shape, own in zip([(*rows, 8), (5, 8), (5,)], way, strict=True)]
    dims = tuple(0 if own else None for own in way)
    compare(F.linear, arguments, dims)
    compare(F.linear, arguments, dims, FastRules({"w": arguments[1]}))


@pytest.mark.parametrize("way", ways(2))
def test_linear_without_bias_equals_stock(way):
    arguments = [draw(3, (4, 8), way[0]), draw(3, (5, 8), way[1])]
    compare(F.linear, arguments, tuple(0 if own else None for own in way))


def test_linear_takes_a_member_axis_that_is_not_first():
    compare(F.linear, (torch.randn(4, 3, 8), torch.randn(5, 8, 3)), (1, 2))


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("way", ways(3))
def test_layer_norm_equals_stock(members, way):
    arguments = [draw(members, shape, own) for shape, own in zip([(2, 3, 8), (8,), (8,)], way, strict=True)]
    compare(lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-12), arguments, tuple(0 if own else None for own in way))


@pytest.mark.parametrize("way", ways(3))
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 6), (2, 1, 5, 6), (5, 6)])
def test_attention_equals_stock(way, mask):
    shapes = [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)]
    arguments = [draw(4, shape, own) for shape, own in zip(shapes, way, strict=True)]
    keep = None if mask is None else torch.rand(mask) > 0.3
    if keep is not None:
        keep[..., 0] = True  # a row without any key has no defined result
    compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3),
        arguments,
        tuple(0 if own else None for own in way),
    )


def test_attention_takes_a_mapped_mask():
    q, mask = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 1, 1, 5)
    compare(lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), (q, mask), (0, 0))


def test_gradients_flow_through_the_rules():
    def run(x, table, w, b):
        hidden = F.embedding(x, table)
        return F.layer_norm(F.linear(hidden, w, b), (6,), b, b).pow(2).sum()

    ids = torch.randint(0, 9, (4,))
    leaves = [torch.randn(3, *shape, requires_grad=True) for shape in [(9, 5), (6, 5), (6,)]]
    dims = (None, 0, 0, 0)
    expected = torch.autograd.grad(vmap(run, in_dims=dims)(ids, *leaves).sum(), leaves)
    with FastRules({"w": leaves[1].detach()}):
        got = torch.autograd.grad(vmap(run, in_dims=dims)(ids, *leaves).sum(), leaves)
    for ours, stock in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_what_no_rule_covers_goes_to_stock():
    x, w = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5)
    with FastRules():
        nested = vmap(vmap(F.linear))(x, w)
        assert torch.equal(F.linear(x, w[0]), torch.nn.functional.linear(x, w[0]))
    torch.testing.assert_close(nested, vmap(vmap(F.linear))(x, w))


def test_every_listed_function_reaches_its_rule(monkeypatch):
    seen = []
    for function in RULES:
        monkeypatch.setitem(RULES, function, lambda *_a, f=function, **_k: seen.append(f) or NotImplemented)
    x, w = torch.randn(2, 1, 2, 3, 4), torch.randn(2, 4, 4)

    def run(x, w):
        F.embedding(torch.tensor([1]), w)
        F.layer_norm(F.linear(x, w), (4,))
        return F.scaled_dot_product_attention(x, x, x)

    with FastRules():
        vmap(run)(x, w)
    assert seen == [F.embedding, F.linear, F.layer_norm, F.scaled_dot_product_attention]


def test_shared_arguments_stay_unbatched():
    seen = []

    def run(own, x, w):
        y = F.linear(x, w)
        seen.append(torch._C._functorch.is_batchedtensor(y))
        return y.sum() + own

    with FastRules():
        vmap(run, in_dims=(0, None, None))(torch.zeros(3), torch.randn(2, 4), torch.randn(5, 4))
    assert seen == [False]


def test_prepacked_matrices_are_those_of_this_weight():
    weight, trunk = torch.randn(3, 5, 8), torch.randn(7, 8)
    rules = FastRules({"w": weight, "t": trunk, "b": torch.randn(5)})
    assert len(rules.prepacked(weight, 7, needs_grad=False)) == 3
    assert len(rules.prepacked(trunk, 7, needs_grad=False)) == 1
    assert rules.prepacked(weight, 7, needs_grad=True) is None
    assert rules.prepacked(weight[1:], 7, needs_grad=False) is None
    assert rules.prepacked(torch.randn(3, 5, 8), 7, needs_grad=False) is None


@pytest.mark.parametrize("blas_is_slower", [True, False])
def test_many_rows_go_to_what_was_measured_faster(monkeypatch, blas_is_slower):
    weight = torch.randn(3, 5, 8)
    where, name = (torch, "bmm") if blas_is_slower else (batching_rules, "_multiply_packed")
    slow, clock = getattr(where, name), [0.0]

    def take_a_second(*args):
        clock[0] += 1.0
        return slow(*args)

    def read_clock(call, args):
        before = clock[0]
        return call(*args), clock[0] - before

    monkeypatch.setattr(where, name, take_a_second)
    monkeypatch.setattr(batching_rules, "time_call", read_clock)  # a busy machine's own clock says anything
    rules = FastRules({"w": weight})
    assert (rules.prepacked(weight, 10_000, needs_grad=False) is not None) == blas_is_slower
    assert rules.prepacked(weight, FEW_ROWS, needs_grad=False) is not None


@pytest.mark.parametrize("biased", [True, False])
def test_a_shared_layer_runs_on_its_reordered_matrix(biased):
    x, weight, own_bias = torch.randn(2, 7, 8), torch.randn(5, 8), torch.randn(3, 5)
    rules = FastRules({"w": weight})
    used = []
    whole = rules.prepacked
    rules.prepacked = lambda *args, **kwargs: used.append(whole(*args, **kwargs)) or used[-1]
    compare(lambda bias: F.linear(x, weight, bias if biased else None) + bias, (own_bias,), (0,), rules)
    assert used
    assert used[0] is not None
