"""distil and prune of encoders: one student, fewer layers, another architecture, heads; other vocabularies."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from archiver.__main__ import main as archive_command
from archiver.command import main as command
from optimise.distil.command import main as distil
from optimise.examples.change import change_tokens
from tests.conftest import write_archive
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.models.architecture import build_architecture

ROOT = Path(__file__).resolve().parents[3]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD, OTHER = (
    ["fine", "good", "great", "nice"],
    ["poor", "bad", "awful", "dull"],
    ["a", "the", "film", "plot", "was"],
)
WORDS = [*SPECIAL, *GOOD, *BAD, *OTHER]
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"vocab_size": len(WORDS), "max_position_embeddings": 24},
}
LABELS = {0: "down", 1: "up"}


def save_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of several lengths whose label is the kind of word that is the more frequent."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str], number: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (number,), generator=generator).tolist()]

    rows = []
    for index in range(count):
        label = index % 2
        words = draw(GOOD if label else BAD, 2) + draw(BAD if label else GOOD, 1) + draw(OTHER, 1 + index % 6)
        order = torch.randperm(len(words), generator=generator).tolist()
        rows.append((" ".join(words[i] for i in order), LABELS[label]))
    return rows


def train(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = write_texts(160, seed)
    ids = [[2, *(WORDS.index(word) for word in text.split()), 3] for text, _ in rows]
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    inputs = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    labels = torch.tensor([int(label == "up") for _, label in rows])
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs, mask).logits, labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of three small BERTs, and two tables."""
    root = tmp_path_factory.mktemp("texts")
    config = transformers.BertConfig(**SIZES, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    states = {f"m{seed}": train(config, seed).state_dict() for seed in range(3)}
    settings = {"name": "reviews", "handler": "bert_handler.py", "max_length": 16}
    folder = write_archive(root / "reviews", states, settings)
    config.save_pretrained(folder / "pretrained")
    save_tokenizer(folder / "pretrained", WORDS)
    rows = write_texts(120, 9)
    (root / "learn.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    lines = [{"text": text, "label": label} for text, label in write_texts(80, 10)]
    (root / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def run(texts: Path, output: Path, *more: str) -> int:
    given = ["--data", str(texts / "learn.csv"), "--test", str(texts / "test.jsonl"), "--output", str(output)]
    free = ["--max-accuracy-loss", "1", "--max-nll-loss", "9", "--lr", "0.003"]
    epochs = [] if "--epochs" in more else ["--epochs", "2"]
    return distil([str(texts / "reviews"), *given, *free, *epochs, *more])


def pack(output: Path, name: str) -> Ensemble:
    store = output.parent / "store"
    config = str(output / "setup_config.json")
    assert archive_command([name, "--no-check", "--config", config, "--output", str(store)]) == 0
    return Ensemble.load(store / f"{name}.mar", execution="eager")


def test_one_student_and_its_archive(texts: Path, tmp_path: Path) -> None:
    assert run(texts, tmp_path / "s", "--epochs", "3") == 0
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert report["labels"] == "given"
    assert report["student"]["accuracy"] >= report["mean_member"]["accuracy"]
    assert set(report["student"]["latency_ms"]) == {"1", "8"}
    packed = pack(tmp_path / "s", "reviews_one")
    (answer,) = packed.predict(["the film was great good fine"])
    assert answer.body["prediction"]["label"] == "up"
    # the written checkpoint by transformers alone
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    model.load_state_dict(load_file(tmp_path / "s" / "student.safetensors"))
    ids = torch.tensor([[2, *(WORDS.index(word) for word in ["the", "film", "was", "great", "good", "fine"]), 3]])
    expected = model.eval()(ids).logits.softmax(-1)[0, 1].item()
    assert answer.body["prediction"]["probability"] == pytest.approx(expected, abs=1e-4)


def test_heads_share_the_encoder(texts: Path, tmp_path: Path) -> None:
    assert run(texts, tmp_path / "s", "--to", "heads", "--head", "bert.pooler", "classifier") == 0
    packed = pack(tmp_path / "s", "reviews_heads")
    assert {key.split(".")[0] for key in packed.forward.members.stacked} <= {"bert", "classifier"}
    assert not any("encoder" in key for key in packed.forward.members.stacked)
    outputs = packed.outputs(["the plot was bad", "nice"])["logits"]
    assert outputs.shape == (3, 2, 2)
    assert not torch.equal(outputs[0], outputs[1])


def test_fewer_layers_start_from_the_last_of_the_members(texts: Path, tmp_path: Path) -> None:
    assert run(texts, tmp_path / "s", "--layers", "1", "--lr", "1e-9", "--epochs", "1", "--weight-decay", "0") == 0
    config = json.loads((tmp_path / "s" / "pretrained" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["id2label"]) == (1, {"0": "down", "1": "up"})
    state = load_file(tmp_path / "s" / "student.safetensors")
    member = load_file(texts / "reviews" / "members" / "m0.safetensors")
    key = "bert.encoder.layer.{}.attention.self.query.weight"
    torch.testing.assert_close(state[key.format(0)], member[key.format(1)], atol=1e-5, rtol=0)
    assert len(pack(tmp_path / "s", "reviews_one").outputs(["nice"])["logits"]) == 1


def save_distilbert(folder: Path) -> Path:
    config = transformers.DistilBertConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=len(WORDS), max_position_embeddings=24
    )
    torch.manual_seed(3)
    transformers.DistilBertForMaskedLM(config).save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    return folder


def test_another_architecture_from_a_directory(texts: Path, tmp_path: Path) -> None:
    folder = save_distilbert(tmp_path / "tiny")
    assert run(texts, tmp_path / "s", "--to", str(folder), "--unlike", str(texts / "test.jsonl")) == 0
    (answer,) = pack(tmp_path / "s", "reviews_one").predict(["awful bad poor"])
    assert answer.body["prediction"]["label"] in ("up", "down")


@pytest.mark.parametrize(
    ("words", "sizes", "message"),
    [
        ([*SPECIAL, *BAD, *GOOD, *OTHER], {}, "tiny: another vocabulary than the members' (10 of its 18 tokens"),
        (WORDS[:-3], {}, "another vocabulary than the members' (15 of its 15 tokens"),
        (None, {"vocab_size": 9}, "another vocabulary than the members' (it has embeddings of 9 tokens)"),
        (WORDS, {"max_position_embeddings": 8}, "the student has positions for 8 tokens, the members read 16"),
    ],
)
def test_a_student_that_reads_other_tokens_is_refused(
    texts: Path, tmp_path: Path, capsys, words: list[str] | None, sizes: dict[str, int], message: str
) -> None:
    folder = tmp_path / "tiny"
    transformers.BertConfig(**{**SIZES, **sizes}).save_pretrained(folder)
    if words is not None:
        save_tokenizer(folder, words)
    assert run(texts, tmp_path / "s", "--to", str(folder)) == 1
    refused(capsys, message, tmp_path / "s")


def refused(capsys: pytest.CaptureFixture[str], message: str, output: Path) -> None:
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_bad_data_and_options(texts: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "labels.csv").write_text("text,label\ngood,sideways\n")
    (tmp_path / "columns.csv").write_text("a,b\ngood,up\n")
    (tmp_path / "empty").mkdir()
    for more, message in (
        (["--data", str(tmp_path / "labels.csv")], "row 1: label 'sideways': no member knows it; they know down, up"),
        (["--data", str(tmp_path / "columns.csv")], "name the one to be answered: a, b"),
        (["--data", str(tmp_path / "empty")], "holds no file that ends in .txt"),
        (["--label-column", "kind"], "no column 'kind'"),
        (["--to", str(tmp_path / "empty")], "expected one, heads, or a directory that save_pretrained wrote"),
        (["--architecture", "mnist"], "'reviews' reads texts; name a directory with --to, or --layers"),
        (["--layers", "2"], "--layers: expected fewer than the members' 2, got 2"),
        (["--augment", "diverse"], "--augment diverse: follows a gradient"),
    ):
        assert run(texts, tmp_path / "s", *more) == 1
        refused(capsys, message, tmp_path / "s")


def test_changed_tokens_are_masks_or_the_neighbours() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 15, (64, 12))
    ids[:, 0], ids[::2, 9:] = 2, 0
    changed = change_tokens(ids, 4, torch.arange(5))
    moved = changed != ids
    assert 0 < moved.float().mean() < 0.3
    assert not moved[:, 0].any()
    assert not moved[::2, 9:].any()
    assert (changed[moved] >= 4).all()
    assert (changed == 4).any()


def test_pruned_encoders_lose_whole_heads_and_answer(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    from optimise.prune.command import main as prune

    given = ["--data", str(texts / "learn.csv"), "--output", str(tmp_path / "p"), "--epochs", "2", "--lr", "0.003"]
    free = ["--max-accuracy-loss", "1", "--max-nll-loss", "9"]
    assert prune([str(texts / "reviews"), *given, *free]) == 0
    told = json.loads((tmp_path / "p" / "pruned.json").read_text())
    assert told["architecture"] == "transformers:sequence_classification"
    layer = "bert.encoder.layer.0."
    assert {key.removeprefix(layer): widths for key, widths in told["widths"].items() if key.startswith(layer)} == {
        "attention.self.query": [32, 16],
        "attention.self.key": [32, 16],
        "attention.self.value": [32, 16],
        "attention.output.dense": [16, 32],
        "intermediate.dense": [32, 32],
        "output.dense": [32, 32],
    }
    packed = pack(tmp_path / "p", "reviews_pruned")
    asked = ["the film was great good fine", "bad"]
    outputs = packed.outputs(asked)["logits"]
    model = build_architecture("pruned.json", None, tmp_path / "p")
    for own, path in zip(outputs, sorted((tmp_path / "p").glob("*.safetensors")), strict=True):
        model.load_state_dict(load_file(path))
        for row, text in zip(own, asked, strict=True):
            ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
            torch.testing.assert_close(row, model(ids).logits[0], rtol=1e-4, atol=1e-5)


def test_the_commands_of_the_page_run_as_written(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny archive, under the names that the page has, and with no more than one epoch."""
    page = (ROOT / "docs" / "distil.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}vmap-ensemble (distil model_store/bert.*)$", page, re.M)
    assert len(lines) == 4
    monkeypatch.chdir(tmp_path)
    shutil.copytree(texts / "reviews", tmp_path / "model_store" / "bert_ens.mar")
    shutil.copy(texts / "learn.csv", "reviews.csv")
    shutil.copy(texts / "test.jsonl", "reviews.jsonl")
    save_distilbert(tmp_path / "distilbert")
    for line in lines:
        words = [word if word != "2" else "1" for word in shlex.split(line)]  # the tiny members have two layers
        assert command([*words, "--epochs", "1", "--max-accuracy-loss", "1", "--max-nll-loss", "9"]) == 0
