"""Hugging Face directories and traced files become archives that load, and those that don't fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from archiver.members.resolve import resolve_members
from archiver.texts import traced
from archiver.texts.pretrained import adapt_state
from tests.archive.conftest import Project
from vmap_ensemble.archive.manifest import check_hashes, hash_file, load_members, read_manifest
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.states import tied_groups
from vmap_ensemble.errors import ArchiveError, SettingsError
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.models.text_modes import TEXT_MODES

# Modes and files are under test here, not the answers of the BERT handler: its settings would do as well.
HANDLER = """from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler
from vmap_ensemble.tasks.text.settings import TextSettings
class TinyTextHandler(VmapEnsembleHandler):
    settings_class = TextSettings
    @classmethod
    def architecture_of(cls, settings):
        return settings.architecture or f"transformers:{settings.mode}"
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran"]
SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"vocab_size": len(WORDS), "max_position_embeddings": 40},
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "electra": lambda: transformers.ElectraConfig(embedding_size=16, **SIZES),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=len(WORDS), max_position_embeddings=40
    ),
}


def save_tokenizer(folder: Path, words: list[str] = WORDS, lowercase: bool = True) -> None:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(
        folder
    )


def save_member(
    folder: Path, seed: int = 0, mode: str = "sequence_classification", family: str = "bert", **changes: Any
) -> Any:
    """A tiny random model with its tokenizer, as save_pretrained writes them."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = getattr(transformers, TEXT_MODES[mode].auto_class).from_config(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.fixture
def text(project: Project) -> Project:
    """A project whose handler takes texts and whose two members lie in runs/."""
    (project.folder / "tiny_handler.py").write_text(HANDLER)
    for seed in range(2):
        save_member(project.folder / f"runs/fold{seed}", seed)
    project.block(model_file=None, input_shape=None, members=["runs"])
    return project


def logits_of(output: Any) -> torch.Tensor:
    return output[0]


IDS = torch.tensor([[2, 6, 8, 3], [2, 7, 9, 3]])


def test_directories_become_members_named_after_them(text: Project) -> None:
    assert text.run("tiny") == 0
    folder = text.unpack()
    manifest = read_manifest(folder)
    assert [(member.name, member.source) for member in manifest.members] == [("fold0", "fold0"), ("fold1", "fold1")]
    assert manifest.members[1].source_sha256 == hash_file(text.folder / "runs/fold1/model.safetensors")
    assert json.loads((folder / "setup_config.json").read_text())["architecture"] == (
        "transformers:sequence_classification"
    )
    assert {path.name for path in (folder / "pretrained").iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "pretrained", local_files_only=True)
    assert tokenizer("A cat")["input_ids"] == [WORDS.index("a"), WORDS.index("cat")]


@pytest.mark.parametrize("mode", sorted(TEXT_MODES))
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_what_is_unpacked_computes_what_was_saved(text: Project, family: str, mode: str) -> None:
    shutil.rmtree(text.folder / "runs")
    models = [save_member(text.folder / f"runs/fold{seed}", seed, mode, family) for seed in range(2)]
    text.block(model_file=None, input_shape=None, members=["runs"], mode=mode)
    assert text.run("tiny") == 0
    folder = text.unpack()
    built = build_architecture(f"transformers:{mode}", None, folder)
    forward = EnsembleForward(built, load_members(folder))
    with torch.no_grad():
        for model, got in zip(models, logits_of(forward.loop(IDS)), strict=True):
            torch.testing.assert_close(got, logits_of(model(IDS)), atol=1e-5, rtol=1e-5)


def test_attention_is_sdpa_where_there_is_one_and_ties_stay(tmp_path: Path) -> None:
    for family, attention in (("bert", "sdpa"), ("mpnet", "eager")):
        root = tmp_path / family
        save_member(root / "pretrained", mode="fill_mask", family=family)
        model = build_architecture("transformers:fill_mask", None, root)
        assert model.config._attn_implementation == attention
        assert len(tied_groups(model)) == 2
        assert not model.training


def test_a_tied_decoder_is_stored_once(text: Project) -> None:
    shutil.rmtree(text.folder / "runs")
    for seed in range(2):
        save_member(text.folder / f"runs/fold{seed}", seed, "fill_mask")
    text.block(model_file=None, input_shape=None, members=["runs"], mode="fill_mask")
    assert text.run("tiny") == 0
    members = load_members(text.unpack())
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert members.stacked["cls.predictions.decoder.weight"] is members.stacked[embeddings]


def test_an_embedding_takes_the_encoder_out_of_classifiers(text: Project, capsys) -> None:
    text.block(model_file=None, input_shape=None, members=["runs"], mode="embedding")
    assert text.run("tiny") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert line.endswith(": bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight")
    members = load_members(text.unpack())
    key = "embeddings.word_embeddings.weight"
    saved = load_file(text.folder / "runs/fold1/model.safetensors")
    assert torch.equal(members.stacked[key][1], saved[f"bert.{key}"])
    assert not any("pooler" in name or "classifier" in name for name in members.spec())


def test_keys_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    save_member(tmp_path / "pretrained")
    model = build_architecture("transformers:sequence_classification", None, tmp_path)
    state = {
        **{key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in model.state_dict().items()},
        "bert.embeddings.position_ids": torch.arange(40),
    }
    got, left_out = adapt_state(state, model, embedding=False)
    assert set(got) == set(model.state_dict())
    assert left_out == ["bert.embeddings.position_ids"]


def test_a_head_is_never_dropped_from_a_classifier(text: Project, capsys) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForQuestionAnswering.from_config(CONFIGS["bert"]())
    model.save_pretrained(text.folder / "runs/fold1")
    shutil.copyfile(text.folder / "runs/fold0/config.json", text.folder / "runs/fold1/config.json")
    assert text.run("tiny") == 1
    assert "fold1: key 'bert.pooler.dense.weight' is missing" in capsys.readouterr().err


def test_state_dicts_with_a_pretrained_directory(text: Project) -> None:
    for seed in range(2):
        state = load_file(text.folder / f"runs/fold{seed}/model.safetensors")
        text.save(f"w{seed}.pt", {"state_dict": state})
    text.block(model_file=None, input_shape=None, members=["w*.pt"], pretrained="runs/fold0")
    assert text.run("tiny") == 0
    folder = text.unpack()
    assert [member.name for member in read_manifest(folder).members] == ["w0", "w1"]
    assert (folder / "pretrained/tokenizer.json").is_file()
    assert "pretrained" not in json.loads((folder / "setup_config.json").read_text())


def test_directories_of_one_name_get_their_parents(text: Project) -> None:
    for run in ("a", "b"):
        shutil.copytree(text.folder / "runs/fold0", text.folder / f"{run}/best")
    names = [source.name for source in resolve_members(["a/best", "b/best"], text.folder)]
    assert names == ["a-best", "b-best"]
    assert [source.name for source in resolve_members(["runs/*"], text.folder)] == ["fold0", "fold1"]
    (source,) = resolve_members({"mine": "runs/fold1"}, text.folder)
    assert (source.name, source.folder) == ("mine", text.folder / "runs/fold1")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_how_a_checkpoint_was_made_may_differ(text: Project) -> None:
    change_config(
        text.folder / "runs/fold1", _name_or_path="/home/me/bert", transformers_version="4.0", dtype="float16"
    )
    assert text.run("tiny") == 0
    # A default that is spelled out is no difference.
    change_config(text.folder / "runs/fold1", hidden_act="gelu", chunk_size_feed_forward=0)
    assert text.run("tiny", "--force") == 0


def other_vocabulary(folder: Path) -> None:
    save_tokenizer(folder, [*WORDS[:6], "dog", "cat", *WORDS[8:]])


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def slow_tokenizer(folder: Path) -> None:
    for member in folder.parent.iterdir():
        lose_tokenizer(member)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        (
            "fold1",
            lambda folder: change_config(folder, layer_norm_eps=0.5),
            "member 'fold1': config.json: layer_norm_eps is 0.5, in 'fold0' it is 1e-12",
        ),
        (
            "fold1",
            lambda folder: (folder / "config.json").write_text("["),
            "member 'fold1': config.json: expected JSON",
        ),
        ("fold1", other_vocabulary, "member 'fold1': tokenizer: token 'cat' is 7, in 'fold0' it is 6"),
        (
            "fold1",
            lambda folder: save_tokenizer(folder, lowercase=False),
            "member 'fold1': tokenizer: normalizer.lowercase is false, in 'fold0' it is true",
        ),
        ("fold0", lose_tokenizer, "'fold0' holds no tokenizer"),
        ("fold0", slow_tokenizer, "'fold0': its tokenizer, BertJapaneseTokenizer, has only a slow form"),
        ("fold0", shard, "member 'fold0': its weights are sharded (model.safetensors.index.json)"),
        (
            "fold0",
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "member 'fold0': holds a whole model (model.safetensors) and an adapter (adapter_config.json)",
        ),
        (
            "fold0",
            lambda folder: shutil.copyfile(folder / "model.safetensors", folder.parent / "x.safetensors"),
            "members 'runs': the folder holds checkpoints (x.safetensors) and Hugging Face directories (fold0)",
        ),
    ],
)
def test_members_that_are_not_one_ensemble_are_refused(text: Project, member, change, message, capsys) -> None:
    change(text.folder / "runs" / member)
    assert text.run("tiny") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert text.leftovers() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 5}, "num_labels: the settings say 5, the members' config.json has 2 labels"),
        ({"pretrained": "gone"}, "pretrained: gone/config.json: no such file"),
        ({"architecture": "transformers:summary"}, "architecture 'transformers:summary': expected one of"),
        ({"save_mode": "torchscript"}, "fold"),
    ],
)
def test_settings_that_do_not_fit_are_refused(text: Project, changes, message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(traced, "TOOLS", "no_such_folder")
    text.block(model_file=None, input_shape=None, members=["runs"], **changes)
    assert text.run("tiny") == 1
    assert message in capsys.readouterr().err


def test_architectures_that_can_not_be_built(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no folder pretrained/ in the archive; give members"):
        build_architecture("transformers:fill_mask", None, tmp_path)
    (tmp_path / "pretrained").mkdir()
    with pytest.raises(SettingsError, match=r"pretrained/config.json: no such file"):
        build_architecture("transformers:fill_mask", None, tmp_path)
    (tmp_path / "pretrained/config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(SettingsError, match=r"pretrained/config.json: transformers \d.*unheard_of"):
        build_architecture("transformers:fill_mask", None, tmp_path)
    (tmp_path / "pretrained/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SettingsError, match="model_type 'vit' has no AutoModelForMaskedLM"):
        build_architecture("transformers:fill_mask", None, tmp_path)


class Doubled(torch.nn.Module):
    """Anything that can be scripted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def scripted(text: Project) -> Project:
    for seed in range(2):
        torch.jit.script(Doubled()).save(str(text.folder / f"t{seed}.pt"))
    (text.folder / "lib.so").write_bytes(b"no real library")
    block = {"save_mode": "torchscript", "library_path": "lib.so", "pretrained": "runs/fold0"}
    text.block(model_file=None, input_shape=None, members=["t*.pt"], **block)
    return text


def test_traced_members_are_packed_as_they_are(scripted: Project, capsys) -> None:
    assert scripted.run("tiny") == 0
    assert "traced members are code: it runs when the archive is loaded" in capsys.readouterr().out.replace("\n", " ")
    folder = scripted.unpack()
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    assert [member.file for member in manifest.members] == ["members/t0.pt", "members/t1.pt"]
    assert manifest.shared is None
    assert (folder / "members/t1.pt").read_bytes() == (scripted.folder / "t1.pt").read_bytes()
    assert (folder / "libpyt_fastertransformer.so").read_bytes() == b"no real library"
    assert (folder / "pretrained/tokenizer.json").is_file()
    assert json.loads((folder / "setup_config.json").read_text()) == {
        **{"name": "tiny", "handler": "tiny_handler.py", "save_mode": "torchscript"},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ["w.pt"]}, "w.pt: not a TorchScript file: it holds no code"),
        ({"members": ["setup_config.json"]}, "setup_config.json: not a TorchScript file (File is not a zip file)"),
        ({"pretrained": None}, "'tiny': traced members bring no config.json and no tokenizer"),
        ({"library_path": "gone.so"}, "library_path: gone.so: no such file"),
    ],
)
def test_traced_archives_that_lack_something_are_refused(scripted: Project, changes, message: str, capsys) -> None:
    scripted.save("w.pt", {"a": torch.ones(1)})
    block = {"save_mode": "torchscript", "library_path": "lib.so", "pretrained": "runs/fold0", "members": ["t*.pt"]}
    scripted.block(model_file=None, input_shape=None, **{**block, **changes})
    assert scripted.run("tiny") == 1
    assert message in capsys.readouterr().err


def test_a_missing_tracer_says_what_to_give(text: Project, monkeypatch) -> None:
    monkeypatch.setattr(traced, "TOOLS", "no_such_folder")
    with pytest.raises(ArchiveError, match=r"no_such_folder/trace.py is not installed; give traced .pt"):
        traced._run_tool("trace", [], "member 'fold0'")


def test_traced_members_take_no_samples(scripted: Project, capsys) -> None:
    (scripted.folder / "one.txt").write_text("a cat sat")
    assert scripted.run("tiny", "--samples", str(scripted.folder / "one.txt")) == 1
    error = capsys.readouterr().err
    assert "samples: traced members have the precision that they were traced in" in error
    assert error.count("\n") == 1
    assert scripted.leftovers() == []


def test_transformers_is_quiet_only_while_keys_are_tried() -> None:
    from transformers.utils import logging

    from archiver.texts.pretrained import _quiet_transformers

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with _quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
