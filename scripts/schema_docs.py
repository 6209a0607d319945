"""Turns the models of settings and answers into what editors and clients' generators read.

docs/setup_config.schema.json   a JSON Schema of setup_config.json: names, values and help while one types
docs/answer.schema.json         a JSON Schema of every body that a server sends
docs/openapi.json               the addresses, bodies, headers and answers of a server, OpenAPI 3.1

python -m scripts.schema_docs            writes all
python -m scripts.schema_docs --check    exits 1 when one is out of date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from scripts.generated import write_or_check
from vmap_ensemble.client import bodies

DRAFT = "https://json-schema.org/draft/2020-12/schema"
# What a body is, at its outermost.
BODIES = (bodies.Answer, bodies.Error, bodies.KServeV1, bodies.KServeV2, bodies.Explanation)
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
    from archiver.blocks.block import Block
    from scripts.settings_docs import DOCUMENTED
    from vmap_ensemble.archive.settings import WORKER_KEYS

    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    kinds: tuple[Any, ...] = (Block, *DOCUMENTED.values())
    for kind in kinds:
        schema = TypeAdapter(kind).json_schema()
        definitions |= schema.get("$defs", {})
        for key, value in schema["properties"].items():
            if key not in WORKER_KEYS and key != "name":
                properties.setdefault(key, value)
    return {
        "$schema": DRAFT,
        "title": "setup_config.json",
        "description": "Written by python -m scripts.schema_docs. Archive name -> what it is made of.",
        "type": "object",
        "properties": {"$schema": {"type": "string"}},
        "additionalProperties": {
            "type": "object",
            "properties": properties,
            "additionalProperties": True,  # settings of handlers of one's own
        },
        **({"$defs": definitions} if definitions else {}),
    }


def answer_schema() -> dict[str, Any]:
    """The schema of any JSON body that a server sends."""
    return {
        "$schema": DRAFT,
        "title": "Answer of an ensemble",
        "description": "Written by python -m scripts.schema_docs. Any JSON body that /predictions/ or /explanations/ "
        "gives: answers, explanations, errors, KServe's envelopes.",
        "anyOf": [*({"$ref": f"#/$defs/{kind.__name__}"} for kind in BODIES), _lists("#/$defs/")],
        "$defs": _definitions("#/$defs/"),
    }


def _definitions(place: str) -> dict[str, Any]:
    """The models' schemas, which refer to each other below `place`."""
    _, schema = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=f"{place}{{model}}")
    return _without_titles(schema["$defs"])


def _without_titles(schema: Any) -> Any:
    """A schema without the titles that repeat its keys, and without the null of a key that may be missing."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = {"title"} if isinstance(schema.get("title"), str) else set()
    dropped |= {"default"} if schema.get("default", 0) is None else set()
    return {key: _without_titles(part) for key, part in schema.items() if key not in dropped}


def _lists(place: str) -> dict[str, Any]:
    return {
        "description": "To a JSON list of texts.",
        "type": "array",
        "items": {"$ref": f"{place}Answer"},
        "minItems": 1,
    }


def openapi() -> dict[str, Any]:
    """The interface of a server, whichever it is; its answers are those of `answer_schema`."""
    from vmap_ensemble.version import __version__

    place = "#/components/schemas/"
    kinds = (bodies.Answer, bodies.KServeV1, bodies.KServeV2)
    answer = {"anyOf": [*({"$ref": f"{place}{kind.__name__}"} for kind in kinds), _lists(place)]}
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
                    "explain", "What each word adds to the answer; of texts", {"$ref": f"{place}Explanation"}
                )
            },
        },
        "components": {
            "schemas": _definitions(place),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(identifier: str, summary: str, answer: dict[str, Any], *more: str) -> dict[str, Any]:
    path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in ("name", *more)]
    headers = [
        {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        for name, (text, schema) in HEADERS.items()
    ]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
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


PAGES = {
    "setup_config.schema.json": setup_config_schema,
    "answer.schema.json": answer_schema,
    "openapi.json": openapi,
}


def to_text(page: dict[str, Any]) -> str:
    """A file of JSON."""
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or check all files."""
    texts = {name: lambda make=make: to_text(make()) for name, make in PAGES.items()}
    return write_or_check(texts, "python -m scripts.schema_docs", __doc__)


if __name__ == "__main__":
    sys.exit(main())
