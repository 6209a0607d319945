"""benchmarks.offline: all ways answer the same rows alike, and the command says so where one doesn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.offline import main
from benchmarks.runs import offline
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

FEW = ["--members", "2", "--batch_size", "4", "--asked", "0"]


def test_digits_and_texts_are_answered_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_members("sequence_classification", CONFIGS["bert"](num_labels=4), 1)
    next(iter(model.values())).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", token_types=True)
    sizes = ["--digits", "9", "--texts", "9", "--model_path", str(tmp_path / "bert")]
    assert main([*sizes, *FEW, "--json", str(tmp_path / "figures.json")]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["subject"], row["way"], row["rows"]) for row in rows] == [
        ("digits", "plain DataLoader", 9),
        ("digits", "ours", 9),
        ("texts", "plain DataLoader", 9),
        ("texts", "ours", 9),
    ]
    assert all(row["rows_per_s"] > 0 and row["difference"] <= offline.TOLERANCE for row in rows)
    assert "texts    ours" in capsys.readouterr().out


def test_other_answers_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = offline.answer_ours
    monkeypatch.setattr(offline, "answer_ours", lambda *args: answer(*args) + 0.01)
    assert main(["--rows", "digits", "--digits", "5", *FEW]) == 1
    assert "error: digits: ours differs by 1.0e-02" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--digits", "0"], ["--asked", "-1"], ["--rows", "videos"]])
def test_wrong_usage(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(option)
    assert ended.value.code == 2
    assert option[0] in capsys.readouterr().err
