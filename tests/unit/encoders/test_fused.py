"""Encoders in fused steps against the padded loop, recorded by a recorder that forbids what a CUDA graph forbids."""

import dataclasses
from collections import Counter

import pytest
import torch

from tests.unit.encoders.test_packing import CONFIGS, HEADS, build, make_batch
from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.encoders.forward import POSITIONS, PackedEncoderForward
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution import register
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cuda import mode
from vmap_ensemble.execution.cuda.graphs import Recorded
from vmap_ensemble.execution.graph.steps import LINEAR_ACTIVATIONS, multiply_members


class PlainKernels:
    """The steps in plain torch, counted by what is behind a product."""

    def __init__(self):
        self.ran = Counter()

    def multiply(self, x, weight, bias, other, activation):
        self.ran["residual" if other is not None else activation] += 1
        y = multiply_members(x, weight, bias)
        return LINEAR_ACTIVATIONS[activation](y if other is None else y + other)

    def normalise(self, x, weight, bias, eps):
        self.ran["norm"] += 1
        return torch.layer_norm(x, x.shape[-1:], eps=eps) * weight.unsqueeze(1) + bias.unsqueeze(1)


def record(forward, example, buckets=None):
    """The fused forward as the mode records it, its recorder and kernels."""
    recorder, kernels = FakeRecorder(), PlainKernels()
    return Recorded(forward.static_fused(kernels, example, buckets), forward, recorder), recorder, kernels


@pytest.mark.parametrize(
    ("architecture", "head"),
    [*(("bert", head) for head in HEADS), *((name, "token") for name in sorted({*CONFIGS} & {*POSITIONS}))],
)
def test_fused_equals_the_padded_loop(architecture, head):
    forward = build(architecture, head, 2)
    padding = CONFIGS[architecture]["pad_token_id"]
    recorded, recorder, _ = record(forward, make_batch([3], padding=padding))
    for lengths, width in (([1, 38, 5, 5, 12], 40), ([7], 9), ([1], 1), ([38, 3, 6, 2, 13], 40)):
        prove_equal(forward, recorded, make_batch(lengths, width, padding), 1e-5)  # raises where they differ
    assert recorder.recorded == 3


@pytest.mark.parametrize("members", [1, 2, 5])
def test_a_layer_is_four_products_and_two_norms(members):
    forward = build("bert", "base", members)
    recorded, _, kernels = record(forward, make_batch([3, 5]))
    recorded(*make_batch([3, 5]))
    layers = forward.model.config.num_hidden_layers
    once = {
        "none": layers + 1,
        "gelu": layers,
        "residual": 2 * layers,
        "norm": 2 * layers + 1,
    }  # a pooler, embeddings
    assert kernels.ran == {step: 2 * times for step, times in once.items()}  # a replay runs what was recorded again


def test_batches_that_token_types_set_apart_run_as_they_are():
    forward = build("bert", "sequence", 2)
    ids, mask = make_batch([3, 20, 11])
    types = (torch.arange(20) > 3).long().expand_as(ids)
    for example, given, steps in (
        ((ids, mask), types, 0),
        ((ids, mask, types), types, 1),
        ((ids, mask, types), None, 0),
    ):
        recorded, _, kernels = record(forward, example)
        ours, loop = recorded(ids, mask, given).logits, forward.loop(ids, mask, given).logits
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)
        assert bool(kernels.ran) == bool(steps)


def test_what_members_share_is_computed_once():
    forward = build("bert", "sequence", 2)
    members = forward.members
    trunk = {key: tensor[0] for key, tensor in members.stacked.items() if not key.startswith("classifier")}
    heads = {key: tensor for key, tensor in members.stacked.items() if key.startswith("classifier")}
    model = HEADS["sequence"].from_config(forward.model.config).eval()
    shared = PackedEncoderForward(model, type(members)(members.names, heads, trunk))
    recorded, _, kernels = record(shared, make_batch([3]))
    prove_equal(shared, recorded, make_batch([3, 20, 11]), 1e-5)
    assert set(kernels.ran) == {"none"}  # the heads alone


def test_the_mode_serves_and_keeps_what_it_chose(monkeypatch):
    monkeypatch.setattr(mode, "CudaRecorder", FakeRecorder)
    name = "cudagraph_fused"
    monkeypatch.setitem(register._MODES, name, dataclasses.replace(register.find_mode(name), devices=None))
    run = build_execution(name, build("bert", "sequence", 2), [make_batch([3, 20, 11])])
    assert isinstance(run.run, Recorded)
    assert run.proof.largest_difference < 1e-5
    assert isinstance(run.schedule, dict)
    with pytest.raises(LoadError, match="execution 'cudagraph_fused': EncoderForward has no fused steps"):
        build_execution(name, build("mpnet", "base", 2), [make_batch([3], padding=1)])
