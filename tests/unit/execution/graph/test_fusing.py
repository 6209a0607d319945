"""A layer swallows what it alone feeds, and nothing else."""

import operator

import pytest
import torch
from torch import fx

from vmap_ensemble.execution.graph.fusing import fuse_addition, swallow
from vmap_ensemble.execution.graph.patterns import is_addition


def layer(x, activation="none"):
    y = 3 * x
    return torch.relu(y) if activation == "relu" else y


def layer_add(x, other):
    return 3 * x + other


def make_graph(build):
    """What `build` makes of the nodes x and layer(x)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(layer, (x,))
    graph.output(build(graph, x, node))
    return graph, node


def run(graph, x):
    graph.lint()
    return fx.GraphModule({}, graph)(x)


def name_of(node):
    return "relu" if node.target is torch.relu else None


def test_an_activation_becomes_part_of_the_layer():
    graph, node = make_graph(lambda graph, _, node: graph.call_function(torch.relu, (node,)))
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    assert swallow(node, name_of, nodes) == "relu"
    assert nodes == [node]
    node.args = (*node.args, "relu")
    assert torch.equal(run(graph, torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 6.0]))


@pytest.mark.parametrize("among", [True, False])
def test_what_others_take_or_lies_elsewhere_stays(among):
    def build(graph, _, node):
        relu = graph.call_function(torch.relu, (node,))
        return (relu, node) if among else relu

    graph, node = make_graph(build)
    before = len(graph.nodes)
    assert swallow(node, name_of, None if among else [node]) is None
    assert len(graph.nodes) == before


@pytest.mark.parametrize("left", [True, False])
def test_a_sum_becomes_part_of_the_layer(left):
    graph, node = make_graph(
        lambda graph, x, node: graph.call_function(operator.add, (node, x) if left else (x, node))
    )
    new = fuse_addition(node, is_addition, lambda other: (layer_add, (node.args[0], other)))
    assert new.target is layer_add
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [layer_add]
    assert torch.equal(run(graph, torch.tensor([2.0])), torch.tensor([8.0]))


@pytest.mark.parametrize(
    "build",
    [
        lambda graph, x, node: graph.call_function(torch.add, (node, x), {"alpha": 2}),
        lambda graph, x, node: graph.call_function(operator.add, (node, 1.0)),
        lambda graph, x, node: graph.call_function(operator.add, (node, node)),
        lambda graph, x, node: graph.call_function(operator.mul, (node, x)),
    ],
)
def test_other_sums_stay(build):
    _, node = make_graph(build)
    assert fuse_addition(node, is_addition, lambda other: (layer_add, (node.args[0], other))) is node
    assert fuse_addition(node, is_addition, lambda other: None) is node
