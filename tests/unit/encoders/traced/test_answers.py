"""What a checkpoint answered when it was traced travels in the file, and every load is proved against it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastertransformer.tracing import trace_checkpoint
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.traced.answers import prove_traced, read_answers
from vmap_ensemble.encoders.traced.forward import TracedForward
from vmap_ensemble.errors import LoadError

MODES = ("sequence_classification", "token_classification", "question_answering")


def trace(tmp_path, mode, count=2):
    """Members traced to plain TorchScript, which needs no library."""
    members = random_members(mode, CONFIGS["bert"](num_labels=2), count)
    files = [tmp_path / f"{name}.pt" for name in members]
    for file, model in zip(files, members.values(), strict=True):
        trace_checkpoint(model, mode, file, max_length=20, plain=True)
    return members, files


def load(files):
    modules = [torch.jit.load(str(file)).eval() for file in files]
    return TracedForward(modules, StackedMembers(tuple(file.stem for file in files), {}, {}))


@pytest.mark.parametrize("mode", MODES)
def test_recorded_answers_are_the_checkpoints_own(tmp_path, mode):
    members, files = trace(tmp_path, mode)
    for file, model in zip(files, members.values(), strict=True):
        answers = read_answers(file)
        ids, mask, types = answers.arguments
        assert ids.shape[0] > 1
        assert 0 < mask.sum() < mask.numel()  # a ragged batch
        with torch.inference_mode():
            typed = model(ids, attention_mask=mask, token_type_ids=types).to_tuple()
            plain = model(ids, attention_mask=mask).to_tuple()
        for recorded, own in zip((*answers.outputs, *answers.without_types), (*typed, *plain), strict=True):
            torch.testing.assert_close(recorded, own)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [2, 3])
@torch.inference_mode()
def test_a_load_is_proved_against_them(tmp_path, mode, arguments):
    _, files = trace(tmp_path, mode)
    forward, recorded = load(files), [read_answers(file) for file in files]
    proof = prove_traced(forward, recorded, arguments, None)
    assert proof.largest_difference < 1e-5
    assert proof.argmax_agreement == 1.0
    for parameter in forward.modules[1].parameters():
        parameter.mul_(1.01)
    with pytest.raises(LoadError, match="member 'm1': the vmapped forward differs from the member's own"):
        prove_traced(forward, recorded, arguments, None)


def test_files_of_other_tracers_record_nothing(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "other.pt"))
    assert read_answers(tmp_path / "other.pt") is None


def test_damaged_answers_are_named(tmp_path):
    module = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(module, str(tmp_path / "bad.pt"), _extra_files={"answers.safetensors": b"no"})
    with pytest.raises(LoadError, match=r"bad\.pt: its recorded answers are damaged"):
        read_answers(tmp_path / "bad.pt")
