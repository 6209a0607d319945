"""The packed vmapped forward against the padded loop, for every architecture and head."""

import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from vmap_ensemble.core.members import stack_members
from vmap_ensemble.encoders.attention import attend_packed
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.encoders.forward import PackedEncoderForward, find_encoder
from vmap_ensemble.encoders.packing import boundaries, pack, take_first, unpack
from vmap_ensemble.errors import ItemError, LoadError

BASE = {"vocab_size": 60, "num_labels": 3, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "bert": {**BASE, **WIDE, "max_position_embeddings": 40},
    "roberta": {**BASE, **WIDE, "max_position_embeddings": 42, "pad_token_id": 1},
    "xlm-roberta": {**BASE, **WIDE, "max_position_embeddings": 42, "pad_token_id": 1},
    "distilbert": {**BASE, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": {**BASE, **WIDE, "max_position_embeddings": 40, "embedding_size": 16},
    "mpnet": {**BASE, **WIDE, "max_position_embeddings": 42, "pad_token_id": 1},
}
HEADS = {
    "base": AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "masked": AutoModelForMaskedLM,
}
PER_TOKEN = {"last_hidden_state", "start_logits", "end_logits"}
WITH_TYPES = {"bert", "electra"}


def build(architecture, head, members):
    labels = {"num_labels": 2} if head == "question" else {}
    config = AutoConfig.for_model(architecture, **{**CONFIGS[architecture], **labels})
    states = {}
    for seed in range(members):
        torch.manual_seed(seed)
        model = HEADS[head].from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # fresh biases and norms are 0 and 1: the same in all members
                parameter.add_(0.05 * torch.randn_like(parameter))
        states[f"m{seed}"] = model.state_dict()
    return build_encoder_forward(model, stack_members(states))


def make_batch(lengths, width=None, padding=0):
    torch.manual_seed(7)
    width = width or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape) * mask + padding * (1 - mask)
    return ids, mask


def assert_equal(ours, loop, mask, head):
    assert set(ours.keys()) == set(loop.keys())
    real = mask.bool()
    for name, expected in loop.items():
        got = ours[name]
        if name in PER_TOKEN or head in ("token", "masked"):
            width = got.shape[2]
            got, expected = got[:, real[:, :width]], expected[:, real]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_equals_the_padded_loop(architecture, head):
    forward = build(architecture, head, 2)
    ids, mask = make_batch([1, 38, 5, 5, 12], 40, CONFIGS[architecture]["pad_token_id"])
    with torch.no_grad():
        loop = forward.loop(ids, mask)
        assert_equal(forward(ids, mask), loop, mask, head)
    with torch.inference_mode():
        assert_equal(forward(ids, mask), loop, mask, head)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[1], [40], [15], [7, 7, 7], [40, 1, 2, 3, 39]])
def test_equals_the_loop_for_any_lengths(members, lengths):
    forward = build("bert", "sequence", members)
    ids, mask = make_batch(lengths, 40)
    types = (torch.arange(40) > 3).long().expand_as(ids)
    with torch.inference_mode():
        assert_equal(forward(ids, mask, types), forward.loop(ids, mask, types), mask, "sequence")


@pytest.mark.parametrize("architecture", sorted(WITH_TYPES))
def test_token_types_reach_the_model(architecture):
    forward = build(architecture, "sequence", 2)
    ids, mask = make_batch([6, 9])
    types = torch.ones_like(ids)
    with torch.inference_mode():
        with_types, without = forward(ids, mask, types).logits, forward(ids, mask).logits
    assert (with_types - without).abs().max() > 1e-3


def test_padding_on_the_left_keeps_its_columns():
    forward = build("bert", "base", 2)
    ids, mask = make_batch([4, 9])
    ids, mask = ids.flip(1), mask.flip(1)
    with torch.inference_mode():
        ours, loop = forward(ids, mask), forward.loop(ids, mask)
    torch.testing.assert_close(ours.last_hidden_state[:, mask.bool()], loop.last_hidden_state[:, mask.bool()])


def test_a_text_alone_answers_as_in_a_batch():
    forward = build("roberta", "sequence", 2)
    ids, mask = make_batch([3, 20, 11], padding=1)
    with torch.inference_mode():
        together = forward(ids, mask).logits
        for row in range(3):
            alone = forward(ids[row : row + 1], mask[row : row + 1]).logits
            torch.testing.assert_close(alone[:, 0], together[:, row], rtol=1e-5, atol=1e-5)


def test_shared_trunk_stays_unbatched_and_equals_the_loop():
    config = AutoConfig.for_model("bert", **CONFIGS["bert"])
    torch.manual_seed(0)
    trunk = AutoModelForSequenceClassification.from_config(config).eval()
    states = {}
    for seed in range(5):
        state = dict(trunk.state_dict())
        state["classifier.weight"] = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        states[f"head{seed}"] = state
    members = stack_members(states)
    assert set(members.stacked) == {"classifier.weight"}
    forward = PackedEncoderForward(trunk, members)
    seen = []
    trunk.bert.encoder.register_forward_hook(
        lambda _m, _a, out: seen.append(torch._C._functorch.is_batchedtensor(out.last_hidden_state))
    )
    ids, mask = make_batch([3, 20, 11])
    with torch.inference_mode():
        ours = forward(ids, mask).logits
        assert seen == [False]
        torch.testing.assert_close(ours, forward.loop(ids, mask).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        forward = build("mpnet", "sequence", 2)
    ids, mask = make_batch([3, 5], padding=1)
    with torch.inference_mode():
        forward(ids, mask), forward(ids, mask)
    lines = [record.message for record in caplog.records if "mpnet" in record.message]
    assert lines == ["padding of 'mpnet' can't be removed: it is padded to the longest text"]
    assert not isinstance(forward, PackedEncoderForward)
    with pytest.raises(LoadError, match="padding of 'mpnet' can't be removed; expected one of bert, distilbert"):
        PackedEncoderForward(forward.model, forward.members)


def test_a_model_without_an_encoder_is_refused():
    forward = build("bert", "base", 1)
    del forward.model.encoder
    with pytest.raises(LoadError, match="BertModel: expected the layers under 'encoder' or 'transformer'"):
        find_encoder(forward.model)


def test_pack_groups_texts_by_length():
    packing = pack(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]))
    assert [(g.start, g.count, g.length) for g in packing.groups] == [(0, 2, 2), (4, 1, 3)]
    assert packing.index.tolist() == [0, 1, 7, 8, 3, 4, 5]
    assert packing.first.tolist() == [0, 4, 2]
    assert boundaries(packing, 2).tolist() == [0, 2, 4, 7, 9, 11, 14]


def test_unpack_puts_tokens_back_and_zeros_the_rest():
    packing = pack(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    tokens = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert unpack(tokens, packing).squeeze(-1).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert take_first(tokens, packing).flatten().tolist() == [1, 3]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ItemError, match="text 1 of the batch has no token; expected at least one"):
        pack(torch.tensor([[1, 1], [0, 0]]))


def test_attention_stays_within_a_text():
    packing = pack(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    ours = attend_packed(query, key, value, packing, 0.5)
    for part in (slice(0, 2), slice(2, 5)):
        scores = (query[:, :, part] @ key[:, :, part].mT * 0.5).softmax(-1)
        expected = (scores @ value[:, :, part]).transpose(1, 2)
        torch.testing.assert_close(ours[:, part], expected, rtol=1e-5, atol=1e-6)
