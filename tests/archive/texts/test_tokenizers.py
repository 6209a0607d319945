"""One tokenizer for all members, which lowers as asked and gives what the model has embeddings for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from archiver.source import Source
from archiver.texts.pretrained import check_heads, choose_pretrained
from archiver.texts.tokenizers import (
    compare_tokenizers,
    count_positions,
    fit_tokenizer,
    load_tokenizer,
    set_lower_case,
)
from vmap_ensemble.errors import ArchiveError, SettingsError
from vmap_ensemble.models.architecture import build_architecture

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ana", "Ana", "in", "In", "##a", "a", "A", "b", "B"]


def save(folder: Path, lower: bool = False, kinds: bool = True, **options: Any) -> Path:
    """A word-piece tokenizer as PreTrainedTokenizerFast saves it."""
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    inputs = ["input_ids", *(["token_type_ids"] if kinds else []), "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=inputs, **names, **options
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_slow(folder: Path, lower: bool) -> Path:
    """As a BertTokenizer of transformers 2 to 4 saved it."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    settings = {"do_lower_case": lower, "tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config(**changes: Any) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return transformers.BertConfig(**{**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 16, **changes})


def staged(tmp_path: Path, model_config: Any, **options: Any) -> Path:
    save(tmp_path / "root/pretrained", **options)
    model_config.save_pretrained(tmp_path / "root/pretrained")
    return tmp_path / "root"


def length(root: Path) -> int:
    return int(transformers.AutoTokenizer.from_pretrained(root / "pretrained").model_max_length)


def test_settings_that_differ_over_one_vocabulary_are_refused(tmp_path: Path) -> None:
    base, other = save_slow(tmp_path / "a", False), save_slow(tmp_path / "b", True)
    with pytest.raises(ArchiveError, match=r"member 'b': tokenizer: normalizer\S* is true, in 'a' it is false"):
        compare_tokenizers("a", base, "b", other)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"model_max_length": 12}, "model_max_length is 12"),
        ({"padding_side": "left"}, 'padding_side is "left"'),
        ({"truncation_side": "left"}, 'truncation_side is "left"'),
        ({"kinds": False}, "model_input_names is"),
        ({"lower": True}, "normalizer.lowercase is true"),
    ],
)
def test_what_changes_tokens_is_compared(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ArchiveError, match=f"member 'b': tokenizer: {key}"):
        compare_tokenizers("a", save(tmp_path / "a"), "b", save(tmp_path / "b", **options))


def test_how_a_tokenizer_was_saved_is_not_compared(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a"), save(tmp_path / "b")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name_or_path": "/home/me/x", "chat_template": "y"}))
    compare_tokenizers("a", base, "b", other)


def test_a_post_processor_of_its_own_is_refused(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a"), save(tmp_path / "b")
    values = json.loads((other / "tokenizer.json").read_text())
    values["post_processor"]["single"] = values["post_processor"]["single"][1:]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ArchiveError, match=r"post_processor\.single is"):
        compare_tokenizers("a", base, "b", other)


@pytest.mark.parametrize("text", ['{"version": "9.0"}', "[]", "{", '{"version": "1.0", "model": {"type": "New"}}'])
def test_tokenizers_of_unknown_versions_get_one_line(tmp_path: Path, text: str) -> None:
    save(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text(text)
    with pytest.raises(ArchiveError, match="member 'a': the tokenizer can't be loaded") as error:
        load_tokenizer(tmp_path / "a", "a")
    assert "\n" not in str(error.value)


def test_do_lower_case_is_honoured_where_the_class_does_not_know_it(tmp_path: Path) -> None:
    root = staged(tmp_path, config())
    folder = root / "pretrained"
    cased = transformers.AutoTokenizer.from_pretrained(folder, do_lower_case=True)
    assert cased.tokenize("Ana In") == ["Ana", "In"]  # what makes this necessary
    set_lower_case(True, "a", root)
    lowered = transformers.AutoTokenizer.from_pretrained(folder, do_lower_case=True)
    assert lowered.tokenize("Ana In") == ["ana", "in"]
    assert lowered("Ana", return_offsets_mapping=True)["offset_mapping"] == [(0, 0), (0, 3), (0, 0)]


def test_do_lower_case_of_tokenizers_that_know_it(tmp_path: Path) -> None:
    for asked in (True, False):
        root = tmp_path / str(asked)
        save_slow(root / "pretrained", not asked)
        set_lower_case(asked, "a", root)
        got = transformers.AutoTokenizer.from_pretrained(root / "pretrained", do_lower_case=asked)
        assert got.tokenize("Ana") == (["ana"] if asked else ["Ana"])


def test_do_lower_case_that_has_no_effect_is_refused(tmp_path: Path) -> None:
    root = staged(tmp_path, config(), lower=True)
    with pytest.raises(ArchiveError, match="do_lower_case: false has no effect on the tokenizer of 'a'"):
        set_lower_case(False, "a", root)
    before = (root / "pretrained/tokenizer.json").read_bytes()
    set_lower_case(True, "a", root)
    set_lower_case(None, "a", root)
    assert (root / "pretrained/tokenizer.json").read_bytes() == before


def test_a_tokenizer_without_a_length_gets_the_models(tmp_path: Path) -> None:
    root = staged(tmp_path, config())
    assert length(root) > 10**9
    fit_tokenizer("a", root, build_architecture("transformers:sequence_classification", None, root))
    assert length(root) == 16


@pytest.mark.parametrize(("given", "expected"), [(12, 12), (512, 16)])
def test_the_lesser_length_holds(tmp_path: Path, given: int, expected: int) -> None:
    root = staged(tmp_path, config(), model_max_length=given)
    fit_tokenizer("a", root, build_architecture("transformers:sequence_classification", None, root))
    assert length(root) == expected


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("BertConfig", {}, 16),
        ("RobertaConfig", {"pad_token_id": 1}, 14),
        ("XLMRobertaConfig", {"pad_token_id": 1}, 14),
        ("MPNetConfig", {"pad_token_id": 1}, 14),
        ("DistilBertConfig", {"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8}, 16),
        ("ElectraConfig", {"embedding_size": 8}, 16),
    ],
)
def test_positions_behind_the_padding(kind: str, options: dict[str, Any], expected: int) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    if kind == "DistilBertConfig":
        sizes = {}
    made = getattr(transformers, kind)(vocab_size=20, max_position_embeddings=16, **sizes, **options)
    model = transformers.AutoModel.from_config(made).eval()
    assert count_positions(model) == expected
    ids = torch.full((1, expected), 5)
    assert model(ids).last_hidden_state.shape[1] == expected
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, expected + 1), 5))


def test_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    root = staged(tmp_path, config(vocab_size=len(WORDS) - 1))
    model = build_architecture("transformers:sequence_classification", None, root)
    with pytest.raises(ArchiveError, match=r"token 'B' is 13, the model has embeddings for 0 to 12"):
        fit_tokenizer("a", root, model)


def test_kinds_of_text_without_embeddings_are_refused(tmp_path: Path) -> None:
    root = staged(tmp_path, config(type_vocab_size=1))
    with pytest.raises(ArchiveError, match=r"token_type_ids up to 1, the model knows 1"):
        fit_tokenizer("a", root, build_architecture("transformers:sequence_classification", None, root))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_is_refused_and_never_run(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "a")
    config().save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    path = folder / file
    values = {
        **json.loads(path.read_text()),
        "auto_map": {"AutoConfig": "code.Config", "AutoTokenizer": "code.Config"},
    }
    path.write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    read = load_tokenizer if file == "tokenizer_config.json" else lambda *_: choose_pretrained(sources, None)
    sources = [Source("a", folder / "model.safetensors", "a", folder)]
    with pytest.raises(ArchiveError, match=f"member 'a': {file} brings code of its own"):
        read(folder, "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("saved", "mode"),
    [
        ("BertForSequenceClassification", "token_classification"),
        ("BertForTokenClassification", "sequence_classification"),
        ("BertForMaskedLM", "sequence_classification"),
        ("BertModel", "question_answering"),
        ("MyBert", "sequence_classification"),
    ],
)
def test_another_head_than_the_modes_is_refused(tmp_path: Path, saved: str, mode: str) -> None:
    config(architectures=[saved]).save_pretrained(tmp_path)
    with pytest.raises(ArchiveError, match=f"member 'a': config.json: architectures is {saved}, but mode '{mode}'"):
        check_heads([Source("a", tmp_path / "x", "a", tmp_path)], mode)


@pytest.mark.parametrize(
    ("saved", "mode"),
    [
        (["BertForSequenceClassification"], "sequence_classification"),
        (["TFBertForSequenceClassification"], "sequence_classification"),
        (["BertForPreTraining"], "fill_mask"),
        (["BertForSequenceClassification"], "embedding"),
        (None, "question_answering"),
        ([], "question_answering"),
    ],
)
def test_the_modes_head_passes(tmp_path: Path, saved: list[str] | None, mode: str) -> None:
    config(architectures=saved).save_pretrained(tmp_path)
    check_heads([Source("a", tmp_path / "x", "a", tmp_path), Source("file", tmp_path / "y", "y")], mode)


def test_encoders_with_a_decoder_are_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "root", ignore_errors=True)
    staged(tmp_path, transformers.BartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1))
    with pytest.raises(SettingsError, match="model_type 'bart' is an encoder with a decoder"):
        build_architecture("transformers:sequence_classification", None, tmp_path / "root")


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 7, "num_attention_heads": 2},
        {"hidden_size": "wide"},
        {"num_hidden_layers": -1, "vocab_size": -5},
        {"id2label": 3},
        {"hidden_act": "unheard_of"},
    ],
)
def test_configs_that_make_no_model_get_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained/config.json").write_text(json.dumps({"model_type": "bert", **values}))
    with pytest.raises(SettingsError, match=r"pretrained/config\.json: ") as error:
        build_architecture("transformers:sequence_classification", None, tmp_path)
    assert "\n" not in str(error.value)
