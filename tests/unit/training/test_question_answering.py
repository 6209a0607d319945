"""Fine-tuning of members that answer questions: on a tiny random encoder, and what the data must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

import training.question_answering
from tests.unit.training.test_bert import save_weights
from training.options import HELD_OUT_FILE, QUESTIONS_FILE
from training.runs import question_answering as qa
from training.runs.bert import DemoError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "car", "house", "is", "red", "blue", "what", "colour"]
PAIRS = TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)


def make_paragraph(number: int, context: str, question: str, answer: str) -> dict[str, Any]:
    answers = [{"text": answer, "answer_start": context.index(answer)}]
    return {"context": context, "qas": [{"id": str(number), "question": question, "answers": answers}]}


def write_questions(path: Path, paragraphs: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "tiny", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_weights(tmp_path / "weights", WORDS, PAIRS)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The answer is the colour, wherever it stands."""
    contexts = [f"The {thing} is {colour}" for thing in ("car", "house") for colour in ("red", "blue")]
    contexts += ["red is the house", "the blue car"]
    return write_questions(
        tmp_path / "questions.json",
        [
            make_paragraph(number, context, "what colour is the car", "red" if "red" in context else "blue")
            for number, context in enumerate(contexts)
        ],
    )


def test_the_questions_are_many_and_held_out_scenes_are_new() -> None:
    train, held_out = qa.read_questions(QUESTIONS_FILE), qa.read_questions(HELD_OUT_FILE)
    assert len(train) >= 400
    assert len(held_out) >= 100
    titles = [
        {title["title"] for title in json.loads(file.read_text())["data"]} for file in (QUESTIONS_FILE, HELD_OUT_FILE)
    ]
    assert not titles[0] & titles[1]
    assert not {one.context for one in train} & {one.context for one in held_out}
    assert all(one.context.count(one.answer) >= 1 for one in train)
    assert QUESTIONS_FILE.stat().st_size + HELD_OUT_FILE.stat().st_size < 120_000


def test_members_learn_where_the_answer_stands(weights: Path, questions: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(qa, "EPOCHS", 60)
    monkeypatch.setattr(qa, "LEARNING_RATE", 1e-2)
    scores = qa.train_members(weights, questions, questions, range(1, 3), tmp_path / "out")
    assert [score.exact_match for score in scores] == [100.0] * 3
    first, second = (load_file(tmp_path / f"out/seed{seed}/model.safetensors") for seed in (1, 2))
    differing = {key for key in first if not torch.equal(first[key], second[key])}
    assert {"qa_outputs.weight", "bert.encoder.layer.0.output.dense.weight"} <= differing
    assert not any("embeddings" in key for key in differing)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out/seed1")
    assert config.architectures == ["BertForQuestionAnswering"]
    assert (tmp_path / "out/seed1/tokenizer.json").is_file()


def test_a_long_context_is_read_in_windows_and_one_without_the_answer_says_so(weights: Path) -> None:
    mode = qa.make_mode(weights, ["a"])
    context = " ".join([*["the house is blue"] * 30, "the car is red"])
    windows = mode.encode({"question": "what colour is the car", "context": context}).windows
    found = [qa.locate(window, len(context) - 3, len(context)) for window in windows]
    assert len(windows) > 1
    assert found[0] == (0, 0)
    first, last = found[-1]
    assert first == last
    assert windows[-1].arrays["input_ids"][first] == WORDS.index("red")


def test_scores_are_those_of_squad() -> None:
    one = qa.Question("1", "q", "in the old house", "the old house", 3)
    assert qa.score_answers(["old house"], [one]).exact_match == 100.0  # articles don't count
    half = qa.score_answers(["old car", "the old house"], [one, qa.Question("2", "q", *("the old house",) * 2, 0)])
    assert half.exact_match == 50.0
    assert half.f1 == pytest.approx(75.0)


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("data"), "expected the format of SQuAD 1.1 .*data"),
        (lambda v: v["data"].clear(), "questions.json: holds no questions"),
        (
            lambda v: v["data"][0]["paragraphs"][1]["qas"][0]["answers"][0].update(answer_start=1),
            "question 1: its answer doesn't stand at character 1",
        ),
    ],
)
def test_question_files_that_are_wrong_are_refused(questions: Path, change: Any, message: str) -> None:
    edit(questions, change)
    with pytest.raises(DemoError, match=message):
        qa.read_questions(questions)


def test_a_missing_file_is_one_line(tmp_path: Path, weights: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(qa, "find_weights", lambda: weights)
    assert training.question_answering.main(["--questions", str(tmp_path / "gone.json")]) == 1
    assert capsys.readouterr().err == "error: gone.json: can't be read (No such file or directory)\n"
