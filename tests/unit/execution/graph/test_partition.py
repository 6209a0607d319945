"""A partition computes what the whole graph does, what members share once, and hands on only tensors."""

import pytest
import torch

from tests.unit.execution.cpu.test_networks import Headed, Heads, Patches, Plain, build_members
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.partition import argument_positions, partition, whole_program
from vmap_ensemble.execution.graph.patterns import count_convolutions
from vmap_ensemble.execution.graph.values import record_values

CASES = {
    "plain": (Plain, (1, 14, 14), None, (0, 2)),
    "headed": (Headed, (3, 12, 12), "trunk", (2, 1)),
    "heads": (Heads, (3, 12, 12), "trunk", (1, 0)),
    "equal": (Heads, (3, 12, 12), "", (1, 0)),
    "patches": (Patches, (3, 16, 16), None, (0, 1)),
}


def run(lowered, parts, x, index):
    """One member's output, part by part."""
    env = dict(zip(lowered.arguments(), [x], strict=True))

    def call(program):
        slots = [lowered.row(name, index) for name in program.slots]
        return program.compile()(*(env[node] for node in program.inputs), *slots)

    env.update(zip(parts.trunk_outputs, call(parts.trunk), strict=True))
    if parts.own is not None:
        env.update(zip(parts.own_outputs, call(parts.own), strict=True))
    return call(parts.tail)


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_parts_compute_what_the_member_does(case, with_values, with_tail):
    make, shape, shared, (in_trunk, in_own) = CASES[case]
    models, members = build_members(make, 3, shared)
    x = torch.randn(2, *shape)
    lowered = lower_model(make().eval(), members)
    nodes = lowered.nodes()
    cut = len(nodes) - 1 if with_tail else len(nodes)
    with torch.no_grad():
        values = record_values(lowered, nodes, [x]) if with_values else None
        parts = partition(lowered, nodes[:cut], nodes[cut:], values)
        for index, model in enumerate(models):
            if case == "equal":
                model = models[0]
            got, want = run(lowered, parts, x, index), model(x)
            assert set(got) == set(want) if isinstance(want, dict) else got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert count_convolutions(list(parts.trunk.graph.nodes)) == in_trunk
    own = [] if parts.own is None else list(parts.own.graph.nodes)
    assert count_convolutions(own) == in_own
    assert parts.shares_steps is (in_trunk > 0) or not with_values
    assert parts.own_dims == [None] * len(parts.own.inputs if parts.own else ())
    if with_values:
        handed_on = (*parts.trunk_outputs, *parts.own_outputs)
        assert all(isinstance(values[node], torch.Tensor) for node in handed_on)


def test_a_tail_without_steps_only_nests_what_members_give():
    _, members = build_members(Plain, 2)
    lowered = lower_model(Plain().eval(), members)
    nodes = lowered.nodes()
    values = record_values(lowered, nodes, [torch.randn(1, 1, 14, 14)])
    assert partition(lowered, nodes, [], values).gives_members_values
    assert not partition(lowered, nodes[:-1], nodes[-1:], values).gives_members_values
    _, equal = build_members(Plain, 2, "")
    lowered = lower_model(Plain().eval(), equal)
    assert not partition(lowered, lowered.nodes()).gives_members_values  # the output is one for all


def test_the_whole_is_one_member():
    models, members = build_members(Patches, 2)
    x = torch.randn(2, 3, 16, 16)
    lowered = lower_model(Patches().eval(), members)
    program = whole_program(lowered)
    assert argument_positions(lowered, program) == [0]
    with torch.no_grad():
        for index, model in enumerate(models):
            got = program.compile()(x, *(lowered.row(name, index) for name in program.slots))
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
