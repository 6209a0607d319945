"""Every form of labels that people have is read, or refused by a line that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmap_ensemble.archive.labels import parse_labels, read_labels
from vmap_ensemble.errors import SettingsError

PETS = {0: "cat", 1: "dog", 2: "cow"}


@pytest.mark.parametrize(
    "text",
    [
        '{"0": "cat", "1": "dog", "2": "cow"}',
        '{"2": "cow", "0": "cat", "1": "dog"}',
        '{"0": ["n02123045", "cat"], "1": ["n02084071", "dog"], "2": ["n01887787", "cow"]}',
        '{"cat": 0, "dog": 1, "cow": 2}',
        '["cat", "dog", "cow"]',
        '{"label_list": ["cat", "dog", "cow"]}',
        '{"label_list": {"0": "cat", "1": "dog", "2": "cow"}}',
        '{"label_list": "[cat, dog, cow]"}',
        "{\"label_list\": \"['cat', 'dog', 'cow']\"}",
        '\ufeff{"0": "cat", "1": "dog", "2": "cow"}',
    ],
)
def test_forms_of_labels(text: str) -> None:
    got = parse_labels(text.encode(), "labels.json", 3)
    assert got == PETS
    assert list(got) == [0, 1, 2]


def test_the_labels_of_torchserves_token_classification() -> None:
    text = b'{"label_list":"[O, B-MISC, I-MISC, B-PER, I-PER, B-ORG, I-ORG, B-LOC, I-LOC]"}\n'
    assert parse_labels(text, "x", 9)[8] == "I-LOC"


def test_labels_that_are_numbers_as_text() -> None:
    assert parse_labels(b'{"0": "0", "1": "7"}', "x", 2) == {0: "0", 1: "7"}


def test_one_logit_speaks_of_two_classes() -> None:
    assert parse_labels(b'["good", "bad"]', "x", 1) == {0: "good", 1: "bad"}
    assert parse_labels(b'["bad"]', "x", 1) == {0: "bad"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": "cat", "1": "dog"}', "2 labels, the members have 3 classes"),
        ('{"1": "cat", "2": "dog", "3": "cow"}', "numbered from 0 without gaps, and 0 is missing"),
        ('{"0": "cat", "1": "dog", "3": "cow"}', "and 2 is missing"),
        ('{"0": "cat", "1": "dog", "2": 5}', "a name is 5, expected text"),
        ('{"0": "cat", "1": "dog", "2": null}', "a name is None, expected text"),
        ('{"0": "cat", "1": "dog", "2": ""}', "a name is , expected text"),
        ('{"0": [], "1": "dog", "2": "cow"}', r"a name is \[\], expected text"),
        ('{"0": "cat", "1": "dog", "1": "cow"}', "'1' stands there twice"),
        ('{"0": "cat", "01": "dog", "2": "cow"}', "'01' is no class number"),
        ('{"0": "cat", "-1": "dog", "2": "cow"}', "'-1' is no class number"),
        ('{"a": "cat", "b": "dog", "c": "cow"}', "'a' is no class number"),
        ('{"cat": 0, "dog": 1, "cow": 1}', "two names have one number"),
        ('{"cat": 1, "dog": 2, "cow": 3}', "and 0 is missing"),
        ("{}", r"got \{\}"),
        ("[]", r"got \{\}"),
        ("7", "got 7"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"labels.json: .*{message}"):
        parse_labels(text.encode(), "labels.json", 3)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(SettingsError, match="not JSON"):
        parse_labels(b'{"0": "caf\xe9"}', "x")


def test_an_archive_without_labels_has_none(tmp_path: Path) -> None:
    assert read_labels(tmp_path) is None
    (tmp_path / "index_to_name.json").write_text(json.dumps({"0": "ü"}, ensure_ascii=False), encoding="utf-8")
    assert read_labels(tmp_path) == {0: "ü"}
