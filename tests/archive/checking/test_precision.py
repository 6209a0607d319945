"""Sample inputs calibrate int8 and decide whether an archive's precision may be served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from archiver import ROOT as REPOSITORY
from bert_handler import BertEnsembleHandler
from mnist_handler import MnistHandler
from tests.archive.conftest import Project
from tests.archive.texts.test_text_archives import save_member
from vmap_ensemble.archive.precision import read_precision
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.kernel_library import load_library
from vmap_ensemble.models.mnist import MnistNet

DIGITS = REPOSITORY / "data" / "digits"


def near_tie() -> dict[str, torch.Tensor]:
    """A member that prefers the second class by less than half precision can tell."""
    state = {"trunk.weight": torch.zeros(4, 3), "trunk.bias": torch.zeros(4), "head.weight": torch.zeros(2, 4)}
    return {**state, "head.bias": torch.tensor([1.0, 1.001])}


@pytest.fixture
def tie(project: Project) -> Project:
    for seed in range(2):
        project.save(f"m{seed}.pt", near_tie())
    (project.folder / "sample.json").write_text("[1, 2, 3]")
    return project


def write_mnist(project: Project, make_model, **settings) -> list[MnistNet]:
    """Two MNIST members and the block `mnist`."""
    models = [make_model(MnistNet, seed) for seed in range(2)]
    for seed, model in enumerate(models):
        project.save(f"digits/m{seed}.pt", model.state_dict())
    block = {"handler": "mnist_handler.py", "architecture": "mnist", "members": ["digits"], **settings}
    (project.folder / "setup_config.json").write_text(json.dumps({"mnist": block}))
    return models


def unpack(project: Project) -> Path:
    shutil.unpack_archive(project.store / "mnist.mar", project.folder / "out", "zip")
    return project.folder / "out"


def test_int8_is_calibrated_packed_and_served(project, make_model, make_context, ask, capsys) -> None:
    models = write_mnist(project, make_model, quantization="int8", samples=[str(DIGITS)])
    assert project.run("mnist") == 0
    folder = unpack(project)
    found = read_precision(folder)
    assert (found.name, found.samples, found.members) == ("int8", 10, ["m0", "m1"])
    assert "int8 changes 0 of 10 predictions (0.00%)" in capsys.readouterr().out
    handler = MnistHandler()
    handler.initialize(make_context(folder))
    assert handler.ensemble.execution.name == "int8"
    assert handler.describe_handle()["precision"]["samples"] == 10
    rows = [{"body": path.read_bytes()} for path in sorted(DIGITS.glob("*.png"))]
    answers = [answer for status, answer in ask(handler, rows) if status == 200]
    examples = torch.stack([handler.parse(row["body"]) for row in rows])
    with torch.inference_mode():
        expected = torch.stack([model(examples).exp() for model in models]).mean(0)
    assert [answer["prediction"]["index"] for answer in answers] == expected.argmax(1).tolist()
    largest = max(
        abs(entry["probability"] - expected[row, entry["index"]].item())
        for row, answer in enumerate(answers)
        for entry in answer["top_k"]
    )
    assert 0 < largest <= found.largest_probability_difference * 1.01


def test_int8_without_samples_is_refused(project, make_model, capsys) -> None:
    write_mnist(project, make_model, quantization="int8")
    assert project.run("mnist") == 1
    assert "quantization int8 is calibrated on inputs" in capsys.readouterr().err
    assert project.leftovers() == []


def test_an_int8_archive_without_calibration_does_not_load(make_mnist) -> None:
    with pytest.raises(LoadError, match=r"no calibration \(precision.json\).*--samples"):
        make_mnist(2, {"quantization": "int8", "execution": "auto"})


def test_a_malformed_calibration_does_not_load(project, make_model, make_context) -> None:
    write_mnist(project, make_model, quantization="int8", samples=[str(DIGITS)])
    project.run("mnist")
    folder = unpack(project)
    (folder / "precision.json").write_text('{"format": 7}')
    with pytest.raises(LoadError, match=r"precision.json: malformed \(its format isn't 1\)"):
        MnistHandler().initialize(make_context(folder))


def test_a_precision_that_changes_predictions_is_refused(tie: Project, capsys) -> None:
    tie.block(dtype="bf16")
    assert tie.run("tiny", "--samples", "sample.json") == 1
    error = capsys.readouterr().err
    assert "bf16 changes 1 of 1 predictions (100.00%)" in error
    assert "more than max_changed_predictions, 1.00%" in error
    assert tie.leftovers() == []


def test_the_share_that_may_change_is_a_setting(tie: Project) -> None:
    tie.block(dtype="bf16", samples="sample.json", max_changed_predictions=1.0)
    assert tie.run("tiny") == 0
    found = read_precision(tie.unpack())
    assert (found.name, found.samples, found.changed_predictions) == ("bf16", 1, 1)
    probability = torch.tensor([1.0, 1.001]).softmax(0)[1].item()
    assert found.largest_probability_difference == pytest.approx(probability - 0.5, rel=1e-3)


def test_float32_needs_no_judgement(tie: Project, capsys) -> None:
    assert tie.run("tiny", "--samples", "sample.json") == 0
    assert "samples: not used" in capsys.readouterr().out
    assert read_precision(tie.unpack()) is None


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        ("nowhere", "samples: nowhere: expected a file, or a folder with files"),
        ("broken.json", "sample broken.json: "),
        ("short.json", "sample short.json: expected a tensor of shape [3], got [2]"),
    ],
)
def test_samples_that_can_not_be_read_are_named(tie: Project, capsys, samples: str, error: str) -> None:
    (tie.folder / "broken.json").write_text("{")
    (tie.folder / "short.json").write_text("[1, 2]")
    tie.block(dtype="bf16")
    assert tie.run("tiny", "--samples", samples) == 1
    assert error in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_changed_predictions": 2}, "max_changed_predictions: expected a share from 0 to 1, got 2"),
        ({"samples": 7}, "samples: expected paths of files or folders, got 7"),
    ],
)
def test_wrong_keys_are_refused(tie: Project, capsys, change: dict[str, int], error: str) -> None:
    tie.block(**change)
    assert tie.run("tiny") == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"dtype": "bf16"}, "quantization int8 starts from dtype fp32, got dtype bf16"),
        ({"execution": "compiled"}, "expected execution auto or prepared, got compiled"),
    ],
)
def test_int8_goes_with_float32_members_only(project, make_model, capsys, settings, error: str) -> None:
    write_mnist(project, make_model, quantization="int8", samples=[str(DIGITS)], **settings)
    assert project.run("mnist") == 1
    assert error in capsys.readouterr().err


@pytest.mark.skipif(load_library() is None, reason="no kernel for this machine")
def test_int8_of_texts_needs_no_samples_and_is_judged_on_those_given(project, make_context, ask, capsys) -> None:
    for seed in range(2):
        save_member(project.folder / f"runs/fold{seed}", seed, hidden_size=32, intermediate_size=64)
    (project.folder / "cat.txt").write_text("a cat sat")
    block = {"handler": "bert_handler.py", "members": ["runs"], "quantization": "int8"}
    (project.folder / "setup_config.json").write_text(
        json.dumps({"plain": block, "judged": {**block, "samples": ["cat.txt"]}})
    )
    assert project.run("plain", "judged") == 0
    assert "int8 changes 0 of 1 predictions (0.00%)" in capsys.readouterr().out
    for name, judged in (("plain", 0), ("judged", 1)):
        folder = project.folder / f"out-{name}"
        shutil.unpack_archive(project.store / f"{name}.mar", folder, "zip")
        assert (read_precision(folder) is not None) == judged
        handler = BertEnsembleHandler()
        handler.initialize(make_context(folder))
        assert handler.ensemble.execution.name == "int8"
        ((status, answer),) = ask(handler, [{"body": b"a cat sat"}])
        assert (status, answer["ensemble"]["size"]) == (200, 2)
