"""The flat graph of single texts against the plain loop over members."""

import pytest
import torch

from tests.unit.test_packing import CONFIGS, HEADS, WITH_TYPES, assert_equal, build, make_batch
from vmap_ensemble import encoder_graph
from vmap_ensemble.encoder_graph import PreparedEncoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution import build_execution
from vmap_ensemble.lowering import UnsupportedModel

PACKABLE = [name for name in CONFIGS if name != "mpnet"]  # bert is the first


def single(forward, architecture, length):
    ids, mask = make_batch([length])
    types = torch.randint(0, 2, ids.shape) if architecture in WITH_TYPES else None
    return (ids, mask, types) if types is not None else (ids, mask)


@pytest.mark.parametrize(
    ("architecture", "head"), [*(("bert", head) for head in HEADS), *((name, "sequence") for name in PACKABLE[1:])]
)
def test_equals_the_loop_for_every_length(architecture, head):
    forward = build(architecture, head, 2)
    prepared = PreparedEncoder(forward, single(forward, architecture, 4))
    assert prepared.longest == 39 if architecture in WITH_TYPES | {"distilbert"} else 40
    for length in (1, 2, 3, 17, prepared.longest):
        inputs = single(forward, architecture, length)
        with torch.inference_mode():
            assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], head)


@pytest.mark.parametrize("members", [1, 5])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_number_of_members(members, context):
    forward = build("bert", "sequence", members)
    inputs = single(forward, "bert", 6)
    with context():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")


def test_a_single_text_runs_on_the_graph_and_no_other_batch_does(monkeypatch):
    forward = build("bert", "sequence", 2)
    prepared = PreparedEncoder(forward, single(forward, "bert", 4))
    calls = []
    graph = prepared._graph
    prepared._graph = lambda *args: calls.append(args) or graph(*args)
    types = torch.zeros(1, 5, dtype=torch.long)
    for lengths, width, on_graph in (([5], 5, True), ([4], 5, False), ([5, 5], 5, False), ([1], 1, False)):
        calls.clear()
        ids, mask = make_batch(lengths, width)
        inputs = (ids, mask, types[:, :width].expand(len(lengths), -1))
        assert_equal(prepared(*inputs), forward.loop(*inputs), mask, "sequence")
        assert bool(calls) == on_graph
    calls.clear()
    ids, mask = make_batch([5])
    prepared(ids, mask)  # without the token types that it was traced with
    assert not calls


def test_query_key_and_value_are_one_product():
    forward = build("bert", "base", 2)
    prepared = PreparedEncoder(forward, single(forward, "bert", 4))
    products = [node for node in prepared._graph.graph.nodes if node.target is encoder_graph._LINEAR]
    assert len(products) == 2 * (2 * 4 + 1)  # members: layers of QKV, out, up and down; and the pooler


def test_execution_prepared_serves_it():
    forward = build("bert", "sequence", 2)
    execution = build_execution("prepared", forward, [single(forward, "bert", 7)])
    assert isinstance(execution.run, PreparedEncoder)


def test_other_types_are_refused():
    forward = build("bert", "sequence", 2)
    for tensors in (forward.members.stacked, forward.members.shared):
        tensors.update({key: t.double() for key, t in tensors.items() if t.is_floating_point()})
    with pytest.raises(UnsupportedModel, match="expected float32 weights on a CPU"):
        PreparedEncoder(forward, single(forward, "bert", 4))


def test_a_graph_that_differs_is_refused(monkeypatch):
    forward = build("bert", "sequence", 2)
    whole = encoder_graph.flatten

    def spoil(module):
        whole(module)
        for name, tensor in list(module.named_buffers()):  # not in place: they are views of the members
            if tensor.is_floating_point() and not tensor.is_mkldnn:
                module.register_buffer(name, tensor + 1)

    monkeypatch.setattr(encoder_graph, "flatten", spoil)
    with pytest.raises(LoadError, match="the graph differs from the forward"):
        PreparedEncoder(forward, single(forward, "bert", 4))
