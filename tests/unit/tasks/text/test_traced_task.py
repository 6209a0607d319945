"""The handler of traced members against the BERT handler on the same checkpoints: same answers, own refusals."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from fastertransformer import tracing as trace
from ft_bert_handler import FTBertHandler
from tests.unit.tasks.text.test_encoder_task import BIO, CONFIGS, VOCABULARY, random_members, save_tokenizer
from vmap_ensemble.archive.manifest import Manifest, hash_file
from vmap_ensemble.core.members import Member
from vmap_ensemble.errors import LoadError, SettingsError

from bert_handler import BertEnsembleHandler  # isort: skip


@pytest.fixture
def serve(ft_library: Path, tmp_path: Path, make_archive, make_context):
    """The handler of traced members, and the BERT handler of the same checkpoints."""

    def make(mode: str, config: Any, count: int = 2, **settings: Any):
        members = random_members(mode, config, count)
        plain = make_archive({k: m.state_dict() for k, m in members.items()}, {"mode": mode})
        config.save_pretrained(plain / "pretrained")
        save_tokenizer(plain / "pretrained", token_types=True)
        traced = tmp_path / "traced"
        (traced / "members").mkdir(parents=True)
        shutil.copytree(plain / "pretrained", traced / "pretrained")
        rows = []
        for name, member in members.items():
            path = traced / "members" / f"{name}.pt"
            trace.trace_checkpoint(copy.deepcopy(member), mode, path, max_length=64)
            rows.append(Member(name, f"members/{name}.pt", hash_file(path), f"{name}.pt", path.stat().st_size))
        (traced / "members.json").write_text(Manifest(tuple(rows)).to_json())
        (traced / "setup_config.json").write_text(json.dumps({"mode": mode, **settings}))
        shutil.copyfile(ft_library, traced / "libpyt_fastertransformer.so")
        return traced, plain

    return make


def start(kind: Any, folder: Path, make_context: Any) -> Any:
    handler = kind()
    handler.initialize(make_context(folder))
    return handler


def close(ours: Any, reference: Any) -> bool:
    """Whether two archives answer the same; which archive says it may differ."""
    if isinstance(ours, dict):
        differing = {"archive", "sha256"}
        return ours.keys() == reference.keys() and all(close(ours[k], reference[k]) for k in ours.keys() - differing)
    if isinstance(ours, list):
        return len(ours) == len(reference) and all(map(close, ours, reference))
    return ours == pytest.approx(reference, abs=2e-5) if isinstance(ours, float) else ours == reference


ROWS: dict[str, list[Any]] = {
    "sequence_classification": ["a great movie", {"text": "what is it", "text_pair": "a movie"}, "bad"],
    "token_classification": ["sarah lives in new york", {"text": "a movie", "detail": "members"}],
    "question_answering": [
        {"question": "what is it ?", "context": "sarah lives in new york . it is great"},
        {"question": "what", "context": "a movie", "detail": "members"},
    ],
}


@pytest.mark.parametrize("mode", ROWS)
def test_answers_equal_the_bert_handlers(mode, serve, make_context, ask):
    config = CONFIGS["bert"](num_labels=5, id2label=BIO) if mode == "token_classification" else CONFIGS["bert"]()
    traced, plain = serve(mode, config)
    rows = [{"body": body} for body in ROWS[mode]]
    ours = ask(start(FTBertHandler, traced, make_context), rows)
    theirs = ask(start(BertEnsembleHandler, plain, make_context), rows)
    for (status, answer), (_, reference) in zip(ours, theirs, strict=True):
        assert status == 200
        assert close(answer, reference), (answer, reference)


def test_explanations_are_a_501_that_names_the_way(serve, make_context, ask):
    traced, _ = serve("sequence_classification", CONFIGS["bert"]())
    handler = start(FTBertHandler, traced, make_context)
    replies = ask(handler, [{"body": b"a movie"}, {"body": b"a movie"}], [{"explain": "True"}, {}])
    assert [status for status, _ in replies] == [501, 200]
    assert "bert_handler.py" in replies[0][1]["error"]["message"]


def test_a_missing_library_is_named(serve, make_context):
    traced, _ = serve("sequence_classification", CONFIGS["bert"]())
    (traced / "libpyt_fastertransformer.so").unlink()
    with pytest.raises(LoadError, match=r"libpyt_fastertransformer\.so is missing"):
        start(FTBertHandler, traced, make_context)


def test_another_name_of_the_library_is_a_setting(serve, make_context, ask):
    traced, _ = serve("sequence_classification", CONFIGS["bert"](), library="libth_bert.so")
    (traced / "libpyt_fastertransformer.so").rename(traced / "libth_bert.so")
    ((status, _),) = ask(start(FTBertHandler, traced, make_context), [{"body": b"a movie"}])
    assert status == 200


def test_modes_without_traces_are_refused(serve, make_context):
    traced, _ = serve("sequence_classification", CONFIGS["bert"]())
    (traced / "setup_config.json").write_text(json.dumps({"mode": "fill_mask"}))
    with pytest.raises(SettingsError, match="expected one of sequence_classification"):
        start(FTBertHandler, traced, make_context)


def test_the_vocabulary_of_the_tests_fits_their_models():
    assert CONFIGS["bert"]().vocab_size == len(VOCABULARY)
