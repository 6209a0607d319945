"""docs/answer.schema.json against the real answers of every text mode, in every envelope."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from jsonschema import Draft202012Validator

from tests.unit.tasks.text.test_encoder_task import BIO, CONFIGS, serve  # noqa: F401  (a fixture)
from vmap_ensemble.client import bodies

SCHEMA = json.loads(Path("docs/answer.schema.json").read_text(encoding="utf-8"))
LONG = "sarah lives in new york . " * 30
ITEMS: dict[str, list[Any]] = {
    "sequence_classification": [{"text": "a great movie"}, {"text": LONG}],
    "token_classification": [{"text": "sarah lives in new york"}, {"text": LONG}],
    "question_answering": [
        {"question": "what is it", "context": "the goal of life is to be great"},
        {"question": "what is it", "context": LONG},
    ],
    "fill_mask": [{"text": "a [MASK] movie . [MASK]"}],
    "embedding": [{"text": "a great movie"}, {"text": LONG}],
}
# Form in the schema -> mode, changes of its configuration, settings.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ClassAnswer": ("sequence_classification", {"num_labels": 3}, {}),
    "LabelsAnswer": ("sequence_classification", {"num_labels": 3, "problem_type": "multi_label_classification"}, {}),
    "NumbersAnswer": ("sequence_classification", {"num_labels": 1}, {}),
    "PlainAnswer": ("sequence_classification", {"num_labels": 3}, {"response": "torchserve"}),
    "EntitiesAnswer": ("token_classification", {"id2label": BIO, "label2id": {v: k for k, v in BIO.items()}}, {}),
    "QuestionAnswer": ("question_answering", {}, {}),
    "MasksAnswer": ("fill_mask", {}, {}),
    "EmbeddingAnswer": ("embedding", {}, {}),
}
WITH_LIMITS = ("ClassAnswer", "LabelsAnswer", "EntitiesAnswer", "QuestionAnswer", "MasksAnswer")


def check(body: Any, form: str) -> None:
    """By the published schema, and by the model that it is generated from."""
    Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{form}"}]}).validate(body)
    getattr(bodies, form).model_validate(body)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_answers_of_every_mode(form: str, limited: bool, serve: Any, ask: Any) -> None:  # noqa: F811
    mode, config, settings = FORMS[form]
    if limited and form not in WITH_LIMITS:
        pytest.skip("has no limits to abstain by")
    limits = {"abstain_below_probability": 1.0, "abstain_above_mutual_information": 0.0} if limited else {}
    handler, _, _ = serve(mode, CONFIGS["bert"](**config), **settings, **limits)
    items = ITEMS[mode]
    detailed = [{**item, "detail": "members", "subset": ["m0"]} for item in items]
    for status, body in ask(handler, [{"body": item} for item in (*items, *detailed)]):
        assert status == 200, body
        check(body, form)
    replies = ask(
        handler,
        [
            {"body": items},
            {"body": {"instances": items}},
            {"body": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a [MASK] text"]}]}},
            {"body": {"nonsense": 1}},
        ],
    )
    for (status, body), envelope in zip(replies, (None, "KServeV1", "KServeV2", "Error"), strict=True):
        Draft202012Validator(SCHEMA).validate(body)
        if envelope and (status == 200 or envelope == "Error"):
            check(body, envelope)


@pytest.mark.parametrize("form", [*WITH_LIMITS, "NumbersAnswer"])
def test_explanations_follow_the_schema(form: str, serve: Any, ask: Any) -> None:  # noqa: F811
    mode, config, settings = FORMS[form]
    handler, _, _ = serve(mode, CONFIGS["bert"](**config), **settings)
    item = {**ITEMS[mode][0], "detail": "members"}
    ((status, body),) = ask(handler, [{"body": item}], [{"explain": "True"}])
    assert status == 200, body
    check(body, "Explanation")
