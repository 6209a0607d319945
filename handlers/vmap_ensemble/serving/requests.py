"""Turns one row of a TorchServe batch into a Request, and answers or an error into one JSON reply.

A row arrives as raw bytes (`curl -T`), a JSON body (already parsed by TorchServe, or bytes over gRPC),
multipart fields, or a KServe v1 or v2 body. TorchServe's own KServe envelopes answer 503 as soon as a
batch holds two requests, so those bodies are recognised here and no envelope is used.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.kserve import Envelope, _checked_items, _split_items
from vmap_ensemble.tasks.answers import Options, dump_json

OPTION_NAMES = ("detail", "subset", "top_k", "target")
OPTION_HEADERS = {
    "x-ensemble-detail": "detail",
    "x-ensemble-subset": "subset",
    "x-ensemble-top-k": "top_k",
    "x-ensemble-target": "target",
}
PAYLOAD_KEYS = ("data", "body")


@dataclass(frozen=True)
class Request:
    """One request: its items (one each unless the client sent a batch of its own) and options."""

    items: tuple[Any, ...]
    envelope: Envelope = "single"
    options: Options = field(default_factory=Options)
    request_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def as_batch(request: Request) -> Request:
    """A request whose single item is a list, as a client-side batch of that list's items."""
    if request.envelope != "single" or not isinstance(request.items[0], list):
        return request
    return dataclasses.replace(request, items=_checked_items(request.items[0], "the list"), envelope="list")


def read_request(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Request:
    """Read one row of a batch.

    Args:
        row: Field name -> value, as TorchServe hands it to a handler.
        headers: The request's headers and, under each field's name, that field's own content type.

    Raises:
        RequestError: 400 where the body is missing, not JSON though it claims to be, or an option is wrong.
    """
    plain = {str(k).lower(): v for k, v in headers.items() if isinstance(v, str)}
    payload, fields = _split_fields(row, headers, plain)
    if isinstance(payload, (bytes, bytearray, memoryview)):
        payload = _decode_json_bytes(bytes(payload), _claims_json(row, headers, plain))
    options: dict[str, Any] = {OPTION_HEADERS[k]: v for k, v in plain.items() if k in OPTION_HEADERS}
    options.update(fields)
    items: tuple[Any, ...] = (payload,)
    envelope: Envelope = "single"
    request_id = None
    if isinstance(payload, dict):
        request_id = payload.get("id") if isinstance(payload.get("id"), str) else None
        parameters = payload.get("parameters")
        if isinstance(parameters, dict):
            options.update({k: parameters[k] for k in OPTION_NAMES if k in parameters})
        options.update({k: payload[k] for k in OPTION_NAMES if k in payload})
        payload = {k: v for k, v in payload.items() if k not in OPTION_NAMES}
        items, envelope = _split_items(payload)
    return Request(items, envelope, _read_options(options), request_id, plain)


def _split_fields(
    row: Mapping[str, Any], headers: Mapping[str, Any], plain: Mapping[str, str]
) -> tuple[Any, dict[str, Any]]:
    """The payload of a row, and the options among its multipart fields."""
    if plain.get("content-type", "").lower().startswith("application/x-www-form-urlencoded"):
        raise RequestError(
            400,
            "the body came as a form, whose encoding loses it; send a file with 'curl -T FILE', text with "
            "'curl -H \"Content-Type: text/plain\" --data-binary TEXT', or JSON with "
            "'curl --json JSON'",
        )
    fields = {k: v for k, v in row.items() if k in OPTION_NAMES}
    rest = {k: v for k, v in row.items() if k not in OPTION_NAMES}
    for key in PAYLOAD_KEYS:
        if key in rest:
            payload = rest[key]
            break
    else:
        if not rest:
            raise RequestError(400, "the request has no body; send the input as the body or as a field 'data'")
        # Fields of other names: one is the payload whatever it is called, several are a JSON-like record.
        payload = next(iter(rest.values())) if len(rest) == 1 else {k: _text(v) for k, v in rest.items()}
    if payload is None or (isinstance(payload, (bytes, bytearray, str)) and len(payload) == 0):
        raise RequestError(400, "the body is empty; send the input as the body or as a field 'data'")
    return payload, fields


def _text(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return bytes(value)
    return value


def _claims_json(row: Mapping[str, Any], headers: Mapping[str, Any], plain: Mapping[str, str]) -> bool:
    types = [plain.get("content-type", "")]
    # Of the fields that may be the payload: an option sent as JSON says nothing of the image beside it.
    kinds = [headers[k] for k in row if k not in OPTION_NAMES and isinstance(headers.get(k), Mapping)]
    types += [str(kind.get("content-type", "")) for kind in kinds]
    return any("json" in kind.lower() for kind in types)


def _decode_json_bytes(payload: bytes, claims_json: bool) -> Any:
    """Parse bytes that claim to be JSON, or that are a JSON object or list without saying so (gRPC)."""
    if not claims_json and payload.lstrip()[:1] not in (b"{", b"["):
        return payload
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        # A text may begin with a bracket ("[MASK] is ..."), an object never goes on as text.
        if not claims_json and payload.lstrip()[:1] == b"[":
            return payload
        raise RequestError(400, "the body is not valid JSON") from None


def _read_options(raw: Mapping[str, Any]) -> Options:
    return Options(
        detail=_read_detail(raw.get("detail")),
        subset=_read_subset(raw.get("subset")),
        top_k=_read_top_k(raw.get("top_k")),
        target=_read_target(raw.get("target")),
    )


def _read_detail(value: Any) -> bool:
    value = _text(value)
    if value in (None, "", False, "none", "false"):
        return False
    if value in (True, "members"):
        return True
    raise RequestError(400, "detail: expected 'members' or nothing")


def _read_subset(value: Any) -> tuple[str, ...] | None:
    value = _text(value)
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise RequestError(400, "subset: expected names of members, separated by commas or as a list")
    cleaned = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not cleaned:
        raise RequestError(400, "subset: expected at least one name of a member")
    return cleaned


def _read_top_k(value: Any) -> int | None:
    value = _text(value)
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(400, "top_k: expected a whole number of at least 1")
    return value


def _read_target(value: Any) -> tuple[str | int, ...] | None:
    value = _text(value)
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        raise RequestError(400, "target: expected labels or numbers, separated by commas or as a list, or 'all'")
    return tuple(dict.fromkeys(names))


def wrap_answers(request: Request, answers: list[dict[str, Any]], model_name: str) -> Any:
    """Put the answers to one request's items into the envelope that the request came in."""
    if request.envelope == "kserve_v1":
        return {"predictions": answers}
    if request.envelope == "kserve_v2":
        data = [dump_json(answer) for answer in answers]
        output = {"name": "answers", "datatype": "BYTES", "shape": [len(data)], "data": data}
        reply: dict[str, Any] = {"model_name": model_name, "outputs": [output]}
        return {"id": request.request_id, **reply} if request.request_id else reply
    return answers if request.envelope == "list" else answers[0]


def error_body(status: int, message: str) -> dict[str, Any]:
    """The JSON body of a refused request; over gRPC, which drops statuses, it is all a client sees."""
    return {"error": {"code": status, "message": message}}
