"""sentence-transformers directories and adapters become members that compute the same, or are refused by name."""

from __future__ import annotations

import builtins
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from archiver.members.resolve import resolve_members
from archiver.texts.adapters import merge_adapter
from archiver.texts.pretrained import find_directory, find_weights, is_lone_adapter
from archiver.texts.sentence import join_sentence_models, read_sentence_model
from archiver.texts.tokenizers import has_tokenizer
from tests.archive.texts.test_text_archives import save_tokenizer
from vmap_ensemble.errors import ArchiveError

KIND = "sentence_transformers.models."


def sentence(
    folder: Path,
    modules: list[tuple[str, str]] | None = None,
    pooling: dict[str, Any] | None = None,
    **files: dict[str, Any],
) -> Path:
    """A directory as sentence-transformers saves it; files by their names without `.json`."""
    modules = modules or [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    rows = [{"idx": i, "name": str(i), "path": path, "type": KIND + kind} for i, (kind, path) in enumerate(modules)]
    for _, path in modules:
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / modules[0][1] / "config.json").write_text('{"model_type": "bert"}')
    (folder / modules[0][1] / "model.safetensors").touch()
    if (folder / "1_Pooling").is_dir():
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    model = read_sentence_model(folder, "a")
    assert model is not None
    return model.settings


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 8}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    assert settings_of(sentence(tmp_path, pooling=pooling)) == {"pooling": expected}


def test_length_and_case_are_read(tmp_path: Path) -> None:
    said = {"max_seq_length": 128, "do_lower_case": True}
    got = settings_of(sentence(tmp_path, sentence_bert_config=said))
    assert got == {"pooling": "mean", "max_length": 128, "do_lower_case": True}


def test_a_plain_directory_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_sentence_model(tmp_path, "a") is None
    assert join_sentence_models({"a": tmp_path}, {}) == ({}, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "Pooling: max can't be served"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            r"Pooling: cls \+ mean can't be served",
        ),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "Pooling: lasttoken can't be served"),
        (
            {"modules": [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]},
            "a Dense module after the encoder can't be served",
        ),
        ({"modules": [("Transformer", "")]}, "no Pooling module"),
        (
            {"config_sentence_transformers": {"prompts": {"q": "query: "}, "default_prompt_name": "q"}},
            "puts the prompt 'query: ' before every text",
        ),
        (
            {
                "modules": [("Transformer", ""), ("Pooling", "1_Pooling")],
                "config_sentence_transformers": {"similarity_fn_name": "dot"},
            },
            "vectors are compared by 'dot' and not normalised",
        ),
    ],
)
def test_what_an_embedding_can_not_do_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchiveError, match=f"member 'a': .*{message}"):
        read_sentence_model(sentence(tmp_path, **options), "a")


def test_a_list_of_modules_that_is_none_gets_one_line(tmp_path: Path) -> None:
    sentence(tmp_path)
    for text in ("{", "[3]", '{"a": 1}', '[{"path": ""}]'):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(ArchiveError, match=r"modules\.json: expected a list of modules"):
            read_sentence_model(tmp_path, "a")


def test_prompts_for_clients_are_told(tmp_path: Path) -> None:
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    model = read_sentence_model(sentence(tmp_path, config_sentence_transformers=said), "a")
    assert model is not None
    assert model.notes == ("prompts of a are not added, clients put them before their texts (query: 'query: ')",)


def test_members_must_agree_unless_the_block_says(tmp_path: Path) -> None:
    folders = {
        "a": sentence(tmp_path / "a", pooling={"pooling_mode": "cls"}),
        "b": sentence(tmp_path / "b", pooling={"pooling_mode": "mean"}),
    }
    with pytest.raises(ArchiveError, match="member 'b': sentence-transformers: pooling is mean, in 'a' it is cls"):
        join_sentence_models(folders, {})
    assert join_sentence_models(folders, {"pooling": "mean"})[0] == {}
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_text("{}")
    with pytest.raises(ArchiveError, match="pooling is absent, in 'a' it is cls"):
        join_sentence_models({"a": folders["a"], "c": tmp_path / "c"}, {})


def test_an_encoder_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    modules = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    folder = sentence(tmp_path / "old", modules, {"pooling_mode_cls_token": True})
    (source,) = resolve_members(["old"], tmp_path)
    assert (source.name, source.folder) == ("old", folder / "0_Transformer")
    assert source.path == folder / "0_Transformer/model.safetensors"
    assert settings_of(source.folder) == {"pooling": "cls"}
    assert find_directory(tmp_path) is None


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": "base", "task_type": "SEQ_CLS", "r": 2, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_an_adapter_beside_a_merged_model_is_told_apart(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "m")
    assert is_lone_adapter(folder)
    assert find_weights(folder) == folder / "adapter_model.safetensors"
    (folder / "config.json").write_text("{}")
    assert is_lone_adapter(folder)
    (folder / "model.safetensors").touch()
    assert not is_lone_adapter(folder)
    with pytest.raises(
        ArchiveError, match=r"whole model \(model\.safetensors\) and an adapter .*delete adapter_config"
    ):
        find_weights(folder)


def test_without_peft_an_adapter_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "m")
    real = builtins.__import__

    def without_peft(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ArchiveError, match=r"member 'm': an adapter .*pip install peft merges it here, or merge it"):
        resolve_members(["m"], tmp_path, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": None}, "task_type: expected one of SEQ_CLS"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "no/such-model"}, "merging the adapter into 'no/such-model' fails"),
    ],
)
def test_adapters_that_can_not_be_merged(tmp_path: Path, changes, message: str, monkeypatch) -> None:
    if importlib.util.find_spec("peft") is None:
        monkeypatch.setitem(sys.modules, "peft", type(sys)("peft"))  # none of these gets as far as calling it
    with pytest.raises(ArchiveError, match=f"member 'm': .*{message}"):
        merge_adapter(adapter(tmp_path / "m", **changes), tmp_path / "merged")


def test_an_adapter_is_merged_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    (source,) = resolve_members(["m"], tmp_path, tmp_path / "scratch")
    assert source.folder is not None
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(source.folder).eval()
    ids = torch.tensor([[2, 5, 7, 3]])
    torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert has_tokenizer(source.folder)


def test_hidden_files_are_no_members(tmp_path: Path) -> None:
    for name in ("m0.pth", "m1.ckpt", "m2.pth.tar", "._m0.pth", ".cache/m3.pth", "notes.txt"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).touch()
    assert [source.name for source in resolve_members(["runs"], tmp_path)] == ["m0", "m1", "m2"]


@pytest.mark.parametrize("name", ["m1.h5", "m1.onnx", "m1.npz"])
def test_a_checkpoint_of_another_kind_is_not_left_out_in_silence(tmp_path: Path, name: str) -> None:
    for file in ("m0.pth", name):
        (tmp_path / file).touch()
    with pytest.raises(ArchiveError, match=f"the folder holds {name}, which looks like a checkpoint"):
        resolve_members(["."], tmp_path)


def test_a_checkpoint_without_a_suffix_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for file in ("m0.pth", "m1.weights"):
        torch.save({"a": torch.ones(1)}, tmp_path / file)
    with pytest.raises(ArchiveError, match=r"the folder holds m1\.weights, which looks like a checkpoint"):
        resolve_members(["."], tmp_path)
