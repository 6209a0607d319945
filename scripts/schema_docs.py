"""Turns settings classes and the schema of answers into what editors and clients' generators read.

docs/setup_config.schema.json   a JSON Schema of setup_config.json: names, values and help while one types
docs/openapi.json               the addresses, bodies, headers and answers of a server, OpenAPI 3.1

python -m scripts.schema_docs            writes both
python -m scripts.schema_docs --check    exits 1 when one is out of date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from scripts.generated import DOCS, write_or_check

ANSWERS = DOCS / "answer.schema.json"
# What ./archive.sh reads itself: archiver/blocks.py; key -> schema.
_PATH, _FLAG = {"type": "string"}, {"type": "boolean"}
_PATHS = {"anyOf": [_PATH, {"type": "array", "items": _PATH}]}
ARCHIVER: dict[str, dict[str, Any]] = {
    "members": {
        "anyOf": [_PATH, {"type": "array", "items": _PATH}, {"type": "object", "additionalProperties": _PATH}]
    },
    "labels": _PATH,
    "model_config": _PATH,
    "extra_files": {"type": "array", "items": _PATH},
    "model_file": _PATH,
    "version": {"type": ["string", "number"]},
    "allow_nan": _FLAG,
    "pretrained": _PATH,
    "library_path": _PATH,
    "samples": _PATHS,
    "max_changed_predictions": {"type": "number", "minimum": 0, "maximum": 1},
    "checkpoint_weights": _PATH,
}
# Header -> what it asks for.
HEADERS = {
    "X-Ensemble-Detail": ("`members`: what each member says", {"const": "members"}),
    "X-Ensemble-Subset": ("names of the members that are asked, with commas", {"type": "string"}),
    "X-Ensemble-Top-K": ("number of labels", {"type": "integer", "minimum": 1}),
}
STATUSES = {
    "400": "The body can't be read, or says what nobody knows.",
    "413": "It is more than the settings allow.",
    "415": "It is of another kind than what is served.",
    "422": "It can be read, and asks for what can't be done.",
    "500": "No member gives a finite answer.",
    "501": "What is asked isn't served here.",
    "507": "There is not enough memory for it alone.",
}


def setup_config_schema() -> dict[str, Any]:
    """The schema of setup_config.json: archive name -> block; which keys a block may have depends on its handler."""
    from pydantic import TypeAdapter

    from scripts.settings_docs import DOCUMENTED
    from vmap_ensemble.archive.settings import WORKER_KEYS

    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for kind in DOCUMENTED.values():
        schema = TypeAdapter(kind).json_schema()
        definitions |= schema.get("$defs", {})
        for key, value in schema["properties"].items():
            if key not in WORKER_KEYS and key != "name":
                properties.setdefault(key, value)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "setup_config.json",
        "description": "Written by python -m scripts.schema_docs. Archive name -> what it is made of.",
        "type": "object",
        "properties": {"$schema": {"type": "string"}},
        "additionalProperties": {
            "type": "object",
            "properties": {**ARCHIVER, **properties},
            "additionalProperties": True,  # settings of handlers of one's own
        },
        **({"$defs": definitions} if definitions else {}),
    }


def openapi() -> dict[str, Any]:
    """The interface of a server, whichever it is; answers are those of docs/answer.schema.json."""
    from vmap_ensemble.version import __version__

    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    schemas = json.loads(json.dumps(answers["$defs"]).replace("#/$defs/", "#/components/schemas/"))
    lists = {"type": "array", "items": {"$ref": "#/components/schemas/answer"}, "minItems": 1}
    kinds: list[dict[str, Any]] = [
        {"$ref": f"#/components/schemas/{name}"} for name in ("answer", "kserve_v1", "kserve_v2")
    ]
    answer = {"anyOf": [*kinds, lists]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmap-ensemble",
            "version": __version__,
            "description": "Written by python -m scripts.schema_docs. Every form of input: docs/requests.md.",
        },
        "paths": {
            "/predictions/{name}": {"post": _operation("predict", "One item, or a list of them", answer)},
            "/predictions/{name}/{version}": {
                "post": _operation("predictVersion", "As /predictions/{name}, of one version", answer, "version")
            },
            "/explanations/{name}": {
                "post": _operation(
                    "explain",
                    "What each word adds to the answer; of texts",
                    {"$ref": "#/components/schemas/explanation"},
                )
            },
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(identifier: str, summary: str, answer: dict[str, Any], *more: str) -> dict[str, Any]:
    path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in ("name", *more)]
    headers = [
        {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        for name, (text, schema) in HEADERS.items()
    ]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/error"}}}
    return {
        "operationId": identifier,
        "summary": summary,
        "parameters": [*path, *headers],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                "text/plain": {"schema": {"type": "string"}},
                "multipart/form-data": {"schema": {"type": "object"}},
            },
        },
        "responses": {
            "200": {"description": "Answered.", "content": {"application/json": {"schema": answer}}},
            **{status: {"description": text, "content": error} for status, text in STATUSES.items()},
            "503": {"description": "The server's own words: no worker, or a full queue."},
        },
    }


PAGES = {"setup_config.schema.json": setup_config_schema, "openapi.json": openapi}


def to_text(page: dict[str, Any]) -> str:
    """A file of JSON."""
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or check both files."""
    texts = {name: lambda make=make: to_text(make()) for name, make in PAGES.items()}
    return write_or_check(texts, "python -m scripts.schema_docs", __doc__)


if __name__ == "__main__":
    sys.exit(main())
