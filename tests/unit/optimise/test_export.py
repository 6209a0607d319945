"""`vmap-ensemble export`: what the file gives against the ensemble's answers, read by the formats' own runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import onnxruntime

from archiver.__main__ import main as archive
from optimise import export
from optimise.export import main
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer
from vmap_ensemble import Ensemble
from vmap_ensemble.core.aggregate import combine_classes
from vmap_ensemble.models.mnist import MnistNet

MODES = ("sequence_classification", "token_classification", "question_answering", "fill_mask", "embedding")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of tiny members: digits with unequal weights, and one of each mode of texts."""
    folder = tmp_path_factory.mktemp("export")
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(MnistNet().state_dict(), folder / f"m{seed}.pt")
    build = ["--no-check", "--output", str(folder), "--set", "execution=eager"]
    files = [str(folder / f"m{seed}.pt") for seed in range(3)]
    digits = ["digits", "--handler", "mnist_handler.py", "--members", *files]
    assert archive([*digits, *build, 'weights={"m0": 2, "m1": 1, "m2": 0}', "temperature=1.5"]) == 0
    for mode in MODES:
        config = CONFIGS["bert"](num_labels=2 if mode == "question_answering" else 3)
        for name, model in random_members(mode, config, 2).items():
            model.save_pretrained(folder / mode / name)
            save_tokenizer(folder / mode / name, token_types=True)
        texts = [f"{mode}_ens", "--handler", "bert_handler.py", "--members", str(folder / mode)]
        assert archive([*texts, *build, f"mode={mode}"]) == 0
    return folder


def run_onnx(path: Path, feed: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, feed), strict=True)}


@pytest.mark.parametrize("method", ["mean_probability", "mean_logit", "majority_vote"])
def test_a_classifiers_file_gives_the_ensembles_numbers(method: str, store: Path, tmp_path: Path) -> None:
    ensemble = Ensemble.load(store / "digits.mar", settings={"aggregation": method})
    found = export.export(ensemble, "onnx", tmp_path / "digits.onnx")
    assert found.inputs == ("input",)
    for batch in (1, 4):
        x = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
        got = run_onnx(tmp_path / "digits.onnx", {"input": x.numpy()})
        outputs = ensemble.outputs(x)
        expected = combine_classes(outputs, ensemble.member_weights.expand(-1, batch), method, 1.5)
        torch.testing.assert_close(got.pop("output"), outputs, rtol=1e-4, atol=1e-5)
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_torch_exports_file_gives_the_same(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store / "digits.mar"), "--to", "pt2", "--output", str(tmp_path / "digits.pt2")]) == 0
    assert "mutual_information" in capsys.readouterr().out
    told = json.loads((tmp_path / "digits.report.json").read_text())
    assert told["size_bytes"] == (tmp_path / "digits.pt2").stat().st_size
    page = (tmp_path / "digits.report.html").read_text()
    assert "digits.pt2: " in page
    assert "<rect" in page
    ensemble = Ensemble.load(store / "digits.mar")
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    outputs, probabilities, *_ = torch.export.load(tmp_path / "digits.pt2").module()(x)
    torch.testing.assert_close(outputs, ensemble.outputs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, ensemble.probabilities(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_texts_of_any_number_and_length(mode: str, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.onnx"
    assert main([str(store / f"{mode}_ens.mar"), "--to", "onnx", "--output", str(path)]) == 0
    ensemble = Ensemble.load(store / f"{mode}_ens.mar")
    for count in (1, 4):
        args = ensemble.task.collate(ensemble.task.sample_examples(count))
        names = ("input_ids", "attention_mask", "token_type_ids")
        feed: dict[str, Any] = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
        got = run_onnx(path, feed)
        with torch.inference_mode():
            expected = ensemble.forward.loop(*args)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4)
        assert ("probabilities" in got) == (mode == "sequence_classification")
        if "probabilities" in got:
            torch.testing.assert_close(got["probabilities"], ensemble.probabilities(*args), rtol=1e-4, atol=1e-5)


def test_nothing_is_replaced_or_left_half(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.onnx"
    path.write_text("mine")
    words = [str(store / "digits.mar"), "--to", "onnx", "--output", str(path)]
    assert main(words) == 1
    assert capsys.readouterr().err == "export: digits.onnx: exists; --force replaces it\n"
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert main([*words, "--force"]) == 1
    assert "the file's outputs differ from the ensemble's by" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["digits.onnx"]
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["absent.mar", "--to", "onnx", "--output", "x.onnx"], 1, "absent.mar: no such archive"),
        (["a.mar", "--to", "onnx", "--output", "x.pt2"], 2, "--output: expected a name that ends in .onnx"),
        (["a.mar", "--to", "tf", "--output", "x.onnx"], 2, "invalid choice: 'tf'"),
    ],
)
def test_wrong_usage_is_one_line(
    more: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(more)
    else:
        assert main(more) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
