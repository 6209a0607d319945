"""Encoders in 8 bits against the same numbers in plain torch, and what they change."""

import pytest
import torch

from tests.unit.encoders.test_packing import HEADS, assert_equal, build
from tests.unit.encoders.test_prepared import PACKABLE, inputs_of
from vmap_ensemble.encoders.quantised import QuantisedEncoderForward, quantise_encoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cpu.encoder_layers import LayerForm
from vmap_ensemble.execution.cpu.kernel_library import load_library
from vmap_ensemble.execution.graph.lowered_model import UnsupportedModel

needs_kernel = pytest.mark.skipif(load_library() is None, reason="no kernel for this machine")


def leaves(outputs, forward, inputs):
    return torch.utils._pytree.tree_leaves(forward.comparable(outputs, inputs, 1))


@needs_kernel
@pytest.mark.parametrize(
    ("architecture", "head"), [*(("bert", head) for head in HEADS), *((name, "sequence") for name in PACKABLE[1:])]
)
def test_equals_its_loop_and_nearly_the_float32_one(architecture, head):
    plain, inputs = build(architecture, head, 2), inputs_of(architecture, [3, 20, 7])
    with torch.inference_mode():
        exact = leaves(plain.loop(*inputs), plain, inputs)
        forward = quantise_encoder(plain, inputs_of(architecture, [4]))
        got, own = (leaves(run(*inputs), forward, inputs) for run in (forward, forward.loop))
    for ours, loop, whole in zip(got, own, exact, strict=True):
        largest = whole.abs().max()
        assert (ours - loop).abs().max() < 0.02 * largest
        assert 0 < (ours - whole).abs().max() < 0.1 * largest


@needs_kernel
def test_one_execution_is_proved_and_serves():
    forward = quantise_encoder(build("bert", "sequence", 2), inputs_of("bert", [4]))
    execution = build_execution("auto", forward, [inputs_of("bert", [7, 3])])
    assert (execution.name, execution.run) == ("int8", forward)
    assert execution.reason == "asked for: 12 linear layers in 8 bits"
    assert execution.proof.tolerance == QuantisedEncoderForward.tolerance


@needs_kernel
def test_a_part_is_its_members_and_new_token_types_are_served():
    forward = quantise_encoder(build("bert", "sequence", 3), inputs_of("bert", [4]))
    ids, mask, types = inputs_of("bert", [3, 5])
    with torch.inference_mode():
        loop = forward.loop(ids, mask, types)
        torch.testing.assert_close(forward.part(1, 3)(ids, mask, types).logits, loop.logits[1:])
        assert_equal(forward(ids, mask), forward.loop(ids, mask), mask, "sequence")


@needs_kernel
def test_gradients_pass_the_rounding():
    plain, (ids, mask, types) = build("bert", "sequence", 2), inputs_of("bert", [5])
    gradients = []
    for forward in (plain, quantise_encoder(plain, (ids, mask, types))):
        table = forward.members.stacked["bert.embeddings.word_embeddings.weight"].requires_grad_()
        forward.member(0, ids, mask, types).logits[0, 1].backward()
        gradients.append(table.grad[0].clone())
        table.grad = None
    assert torch.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.99


def test_what_has_no_8_bit_form_is_refused(monkeypatch):
    inputs = inputs_of("mpnet", [4])
    with pytest.raises(LoadError, match="expected an encoder whose padding can be removed"):
        quantise_encoder(build("mpnet", "sequence", 1), inputs)
    monkeypatch.setattr(LayerForm, "reasons_against", lambda _form: ["no kernel here"])
    with pytest.raises(
        UnsupportedModel, match=r"quantization int8: layers of 'Bert.*': no kernel here; leave it out"
    ):
        quantise_encoder(build("bert", "sequence", 1), inputs_of("bert", [4]))
