"""Real answers against the documented schema, and what the options change."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator

from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.archive.settings import Settings, parse_settings
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.classification import ClassAnswers, kind_for, pick_outputs

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
    for (_, body), form in zip(ask(handler, rows), ("ClassAnswer", "Error", "KServeV1", "KServeV2"), strict=True):
        check(body, form)


def test_torchserves_form(make_mnist, ask, digit):
    handler, _ = make_mnist(2, {"response": "torchserve", "top_k": 3})
    ((_, body),) = ask(handler, [{"data": digit()}])
    check(body, "PlainAnswer")
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


def test_abstaining_is_refused_where_the_answer_has_no_place_for_it():
    block = {"response": "torchserve", "abstain_below_probability": 0.5}
    with pytest.raises(SettingsError, match="abstain_below_probability: expected response 'full'"):
        parse_settings(block, Settings, "setup_config.json")


@pytest.mark.parametrize("members", [10, 11, 14])
def test_sure_answers_follow_the_schema(members):
    answers = ClassAnswers(Settings(), [f"m{i}" for i in range(members)], None)
    logits = torch.tensor([[300.0, 0.0, -5.0]]).expand(members, 1, 3)
    (answer,) = answers(logits, torch.ones(members, 1), [Options(detail=True)])
    check(answer.body, "ClassAnswer")
    assert answer.body["prediction"]["probability"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1)])
def test_one_logit_has_two_labels(shape):
    answers = ClassAnswers(Settings(num_classes=1), ["a", "b"], {0: "cat", 1: "dog"})
    logits = torch.tensor([2.0, -1.0]).reshape(shape)
    (answer,) = answers(logits, torch.ones(2, 1), [Options()])
    dog = torch.tensor([2.0, -1.0]).sigmoid().mean().item()
    found = {row["label"]: (row["index"], row["probability"]) for row in answer.body["top_k"]}
    assert found == {"dog": (1, pytest.approx(dog)), "cat": (0, pytest.approx(1 - dog))}
    assert answer.body["uncertainty"]["mutual_information"] > 0.1
    check(answer.body, "ClassAnswer")


def test_a_softmax_gets_no_other():
    p = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.8, 0.1]]])
    kind = kind_for(Settings(), p)
    (answer,) = ClassAnswers(Settings(), ["a", "b"], None, kind)(p, torch.ones(2, 1), [Options()])
    assert [row["probability"] for row in answer.body["top_k"]] == pytest.approx([0.5, 0.4, 0.1])
    assert kind_for(Settings(output="logits"), p) == "logits"


LOGITS, FEATURES = torch.zeros(2, 4, 3), torch.zeros(2, 4, 8)
Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        (LOGITS, None),
        ((LOGITS, torch.ones(2, 4, 3)), None),
        ([LOGITS, None, torch.zeros(2, 4, 8, 8)], None),
        ((LOGITS, FEATURES), 3),
        ((FEATURES, LOGITS), 3),
        ({"features": FEATURES, "logits": LOGITS}, None),
        ({"out": LOGITS, "aux": torch.ones(2, 4, 3)}, 3),
        (Outputs(LOGITS, FEATURES), None),
    ],
)
def test_the_classifiers_outputs_are_found(outputs, classes):
    assert pick_outputs(outputs, classes) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "classes", "words"),
    [
        ((LOGITS, FEATURES), None, r"tuple\(0: a tensor \(batch, 3\), 1: a tensor \(batch, 8\)\)"),
        ((FEATURES, LOGITS, torch.ones(2, 4, 3)), 3, "expected one tensor"),
        ({"out": torch.zeros(2, 4, 3, 5, 5)}, 3, r"dict\(out: a tensor \(batch, 3, 5, 5\)\)"),
        (torch.zeros(2, 4, 3, 1, 1), 3, r"a tensor \(batch, 3, 1, 1\); expected \(batch, classes\)"),
        ((), None, "expected one tensor"),
    ],
)
def test_outputs_that_could_be_either_are_refused(outputs, classes, words):
    with pytest.raises(LoadError, match=words):
        pick_outputs(outputs, classes)
