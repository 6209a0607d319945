"""docs/setup_config.schema.json and docs/openapi.json: up to date, and true of what the repository has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from archiver.blocks.block import ARCHIVER_KEYS
from scripts import schema_docs, settings_docs
from vmap_ensemble.serving.statuses import STATUSES

ROOT = Path(__file__).resolve().parents[3]


def read(name: str) -> dict:
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", schema_docs.PAGES)
def test_files_are_up_to_date(name: str) -> None:
    assert read(name) == schema_docs.PAGES[name](), "run python -m scripts.schema_docs"


def test_the_page_of_settings_is_up_to_date() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_docs.render(), "run python -m scripts.settings_docs"


def test_the_repositorys_own_blocks_fit() -> None:
    schema = read("setup_config.schema.json")
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads((ROOT / "setup_config.json").read_text()))
    for wrong in ({"a": {"members": 3}}, {"a": {"top_k": 0}}, {"a": {"aggregation": "mean"}}, {"a": []}):
        assert not Draft202012Validator(schema).is_valid(wrong)


def test_every_key_of_the_archiver_is_in_both_pages() -> None:
    properties = read("setup_config.schema.json")["additionalProperties"]["properties"]
    for key in ARCHIVER_KEYS:
        assert properties[key]["description"]
        assert f"| `{key}` |" in settings_docs.HEAD


def test_references_of_openapi_lead_somewhere() -> None:
    api = read("openapi.json")
    text = json.dumps(api)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(api["components"]["schemas"])
    assert "#/$defs/" not in text
    told = set(api["paths"]["/predictions/{name}"]["post"]["responses"])
    assert {str(status) for status in STATUSES.values()} <= told
    for schema in api["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
