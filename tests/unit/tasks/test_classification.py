"""Real answers against the documented schema, and what the options change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator

from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.classification import ClassAnswers

SCHEMA = json.loads(Path("docs/answer.schema.json").read_text(encoding="utf-8"))


def check(body, form):
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{form}"}]}).validate(body)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_real_answers_follow_the_schema(count, make_mnist, ask, digit):
    handler, _ = make_mnist(count, {"abstain_below_probability": 1.0})
    rows = [
        {"data": digit(), "detail": "members", "subset": "m0"},
        {"body": b""},
        {"body": {"instances": [{"data": [[[0.5] * 28] * 28]}]}},
        {
            "body": {
                "id": "a",
                "inputs": [{"name": "x", "shape": [1, 1, 28, 28], "data": [0.5] * 784}],
            }
        },
    ]
    for (_, body), form in zip(ask(handler, rows), ("full", "error", "kserve_v1", "kserve_v2"), strict=True):
        check(body, form)


def test_torchserves_form(make_mnist, ask, digit):
    handler, _ = make_mnist(2, {"response": "torchserve", "top_k": 3})
    ((_, body),) = ask(handler, [{"data": digit()}])
    check(body, "torchserve")
    assert len(body) == 3
    assert list(body.values()) == sorted(body.values(), reverse=True)


def test_equal_labels_keep_the_larger_probability():
    answers = ClassAnswers(Settings(response="torchserve"), ["a"], {0: "crane", 1: "crane", 2: "cat"})
    (answer,) = answers(torch.tensor([[[2.0, 0.0, 1.0]]]), torch.ones(1, 1), [Options()])
    p = torch.tensor([2.0, 0.0, 1.0]).softmax(-1)
    assert answer.body == {"crane": pytest.approx(p[0].item()), "cat": pytest.approx(p[2].item())}


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"abstain_below_probability": 0.99}, ["probability below 0.99"]),
        ({"abstain_above_mutual_information": 0.01}, ["mutual information above 0.01"]),
        ({"abstain_below_probability": 0.1, "abstain_above_mutual_information": 9}, None),
    ],
)
def test_abstaining(settings, reasons):
    logits = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])
    (answer,) = ClassAnswers(Settings(**settings), ["a", "b"], None)(logits, torch.ones(2, 1), [Options()])
    assert answer.body["abstain"] is bool(reasons)
    assert answer.body.get("abstain_reasons") == reasons


def test_labels_are_read(tmp_path):
    (tmp_path / "index_to_name.json").write_text('{"0": "cat", "1": ["n1", "dog"]}')
    assert read_labels(tmp_path) == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "b"}', '{"0": []}'])
def test_wrong_labels_are_refused(text, tmp_path):
    (tmp_path / "index_to_name.json").write_text(text)
    with pytest.raises(SettingsError, match=r"index_to_name\.json: expected"):
        read_labels(tmp_path)
