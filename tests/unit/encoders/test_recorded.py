"""Recorded encoders against the padded loop, by a recorder that forbids on a CPU what a CUDA graph forbids."""

import dataclasses

import pytest
import torch

from tests.unit.encoders.test_packing import CONFIGS, HEADS, build, make_batch
from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.encoders.forward import PackedEncoderForward
from vmap_ensemble.encoders.recorded import PackedTexts, PaddedTexts, round_up
from vmap_ensemble.errors import ItemError, LoadError
from vmap_ensemble.execution import register
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cuda import graphs, mode
from vmap_ensemble.execution.cuda.branches import Branches, take_apart
from vmap_ensemble.execution.cuda.graphs import Recorded


def record(forward, buckets=None):
    """The vmapped forward as mode `cudagraph` records it, and its recorder."""
    recorder = FakeRecorder()
    return Recorded(forward.static_forward(buckets), forward, recorder), recorder


@pytest.mark.parametrize(
    ("architecture", "head"),
    [*(("bert", head) for head in HEADS), *((name, head) for name in CONFIGS for head in ("base", "token"))],
)
def test_recorded_equals_the_padded_loop(architecture, head):
    forward = build(architecture, head, 2)
    recorded, recorder = record(forward)
    padding = CONFIGS[architecture]["pad_token_id"]
    for lengths, width in (([1, 38, 5, 5, 12], 40), ([7], 9), ([38, 3, 6, 2, 13], 40)):
        ids, mask = make_batch(lengths, width, padding)
        prove_equal(forward, recorded, (ids, mask), 1e-5)  # raises where they differ
    assert recorder.recorded == 2  # the first and the last batch lie in one bucket


@pytest.mark.parametrize("members", [1, 2, 5])
def test_token_types_are_laid_out_too(members):
    forward = build("bert", "sequence", members)
    recorded, recorder = record(forward)
    ids, mask = make_batch([3, 20, 11])
    for types in (None, (torch.arange(20) > 3).long().expand_as(ids), torch.zeros_like(ids)):
        ours, loop = recorded(ids, mask, types).logits, forward.loop(ids, mask, types).logits
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 2


@pytest.mark.parametrize("head", ["base", "question", "sequence"])
def test_padding_on_the_left_keeps_its_columns(head):
    forward = build("bert", head, 2)
    ids, mask = (tensor.flip(1) for tensor in make_batch([4, 9]))
    with torch.inference_mode():
        pairs = zip(record(forward)[0](ids, mask).values(), forward(ids, mask).values(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_a_head_on_a_shared_trunk_reads_is_laid_out_once():
    forward = build("bert", "sequence", 2)
    members = forward.members
    trunk = {key: tensor[0] for key, tensor in members.stacked.items() if not key.startswith("classifier")}
    heads = {key: tensor for key, tensor in members.stacked.items() if key.startswith("classifier")}
    shared = PackedEncoderForward(
        HEADS["sequence"].from_config(forward.model.config).eval(), type(members)(members.names, heads, trunk)
    )
    ids, mask = make_batch([3, 20, 11])
    prove_equal(shared, record(shared)[0], (ids, mask), 1e-5)


@pytest.mark.parametrize("tokens", [*range(1, 70), 127, 128, 129, 513, 4097])
def test_an_eighth_of_a_bucket_at_most_is_filled_up(tokens):
    bucket = round_up(tokens)
    assert tokens <= bucket
    assert bucket - tokens <= bucket / 8


def test_there_are_eight_buckets_for_each_doubling():
    assert len({round_up(tokens) for tokens in range(65, 129)}) == 8


def test_the_filling_is_one_more_text_and_missing_texts_are_empty():
    forward = build("bert", "base", 1)
    lay_out = PackedTexts(forward, (4,))
    full, filled = (lay_out(*make_batch(lengths)).lay_out() for lengths in ([7, 5, 6], [7, 6, 6]))
    assert full[-6:].tolist() == [0, 7, 12, 18, 18, 18]  # 18 tokens in a bucket of 18; one more makes 20
    assert filled[-6:].tolist() == [0, 7, 13, 19, 19, 20]
    ids, positions, places = filled[:60].reshape(3, 20).tolist()
    assert [ids[-1], positions[6:8], places[6:8]] == [0, [6, 0], [6, 7]]
    assert places[-1] == 4 * 7  # behind four texts of seven columns


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ItemError, match="text 1 of the batch has no token; expected at least one"):
        PackedTexts(build("bert", "base", 1), None)(torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]]))


def test_what_fills_a_bucket_changes_nothing():
    forward = build("bert", "sequence", 2)
    recorded, _ = record(forward, (4,))
    ids, mask = make_batch([7, 6, 6])
    (alone,) = (recorded(ids[:1], mask[:1]).logits,)
    together = recorded(ids, mask).logits
    torch.testing.assert_close(alone[:, 0], together[:, 0], rtol=1e-5, atol=1e-5)


def test_more_texts_than_any_bucket_run_without_a_recording():
    forward = build("bert", "sequence", 2)
    recorded, recorder = record(forward, (1, 2))
    ids, mask = make_batch([3, 20, 11])
    with torch.inference_mode():
        torch.testing.assert_close(recorded(ids, mask).logits, forward(ids, mask).logits)
    assert recorder.recorded == 0
    with pytest.raises(LoadError, match="expected ascending batch sizes"):
        forward.static_forward((2, 1))


def test_recordings_go_as_those_of_images_do(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    forward = build("bert", "sequence", 1)
    recorded, recorder = record(forward)
    for lengths in ([3], [30], [3]):
        ids, mask = make_batch(lengths)
        prove_equal(forward, recorded, (ids, mask), 1e-5)
    assert recorder.recorded == 3


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("roberta", "question"), ("roberta", "sequence"), ("mpnet", "base"), ("mpnet", "token")],
)
def test_members_one_after_another_and_side_by_side(architecture, head):
    forward = build(architecture, head, 2)
    padding = CONFIGS[architecture]["pad_token_id"]
    recorder = FakeRecorder()
    for run in (forward.loop, Branches(take_apart(forward), recorder)):
        recorded = Recorded(forward.static_batches(run, None), run, recorder)
        for lengths, width in (([1, 34, 5], 40), ([7], 9)):
            ids, mask = make_batch(lengths, width, padding)
            prove_equal(forward, recorded, (ids, mask), 1e-5)
    assert recorder.recorded == 4


def test_texts_are_widened_only_where_padding_is_known_to_change_nothing():
    ids, mask = make_batch([33], padding=1)
    keys = [PaddedTexts(build(name, "sequence", 1), None, None)(ids, mask).key for name in ("roberta", "mpnet")]
    assert keys == [((1, 36), 2), ((1, 33), 2)]
    ids, mask = make_batch([40], padding=1)
    assert PaddedTexts(build("roberta", "sequence", 1), None, None)(ids, mask).key == ((1, 40), 2)  # its longest


@pytest.mark.parametrize("name", ["cudagraph", "cudagraph_loop", "branches"])
def test_the_modes_serve_encoders(monkeypatch, name):
    monkeypatch.setattr(mode, "CudaRecorder", FakeRecorder)
    monkeypatch.setitem(register._MODES, name, dataclasses.replace(register.find_mode(name), devices=None))
    forward = build("bert", "sequence", 2)
    run = build_execution(name, forward, [make_batch([3, 20, 11])])
    assert isinstance(run.run, Recorded)
    assert run.proof.largest_difference < 1e-5
