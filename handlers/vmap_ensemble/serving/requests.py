"""Turns one row of a TorchServe batch into a Request, and answers or an error into one JSON reply.

A row arrives as raw bytes (`curl -T`), a JSON body (already parsed by TorchServe, or bytes over gRPC),
multipart fields, or a KServe v1 or v2 body. TorchServe's own KServe envelopes answer 503 as soon as a
batch holds two requests, so those bodies are recognised here and no envelope is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.kserve import Envelope, checked_items, split_items
from vmap_ensemble.serving.options import (
    OPTION_HEADERS,
    OPTION_NAMES,
    SHOWN,
    as_text,
    body_options,
    check_headers,
    check_keys,
    check_tensors,
    read_options,
)
from vmap_ensemble.tasks.answers import Options, dump_json

PAYLOAD_KEYS = ("data", "body", "b64", "base64", "image")
# What a body may hold beside the options, by its form.
ENVELOPE_KEYS: dict[str, tuple[str, ...]] = {
    "kserve_v1": ("instances", "signature_name", "parameters", "id"),
    "kserve_v2": ("inputs", "outputs", "parameters", "id", "model_name", "model_version"),
}
MOST_ID = 256
# Characters of an error's message: each may take four bytes.
MOST_MESSAGE = 900
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SeveralParts(list[Any]):
    """The values of multipart parts that came under one name."""


@dataclass(frozen=True)
class Request:
    """One request: its items (one each unless the client sent a batch of its own), each with its options."""

    items: tuple[Any, ...]
    options: tuple[Options, ...]
    envelope: Envelope = "single"
    request_id: str | None = None


def read_request(
    row: Mapping[str, Any],
    headers: Mapping[str, Any],
    item_keys: Sequence[str] | None = None,
    lists_are_batches: bool = False,
) -> Request:
    """Read one row of a batch.

    Options may stand in headers, in multipart fields, in the body, and in each of its items: the narrower wins.

    Args:
        row: Field name -> value, as TorchServe hands it to a handler; a list of values where a name came twice.
        headers: The request's headers and, under each field's name, that field's own content type.
        item_keys: Keys that an item may have beside the options; None: any.
        lists_are_batches: Whether any JSON list is a batch; otherwise one of texts or objects is, and one of numbers
            is a tensor.

    Raises:
        RequestError: 400 where the body is missing, not JSON though it claims to be, an option is wrong or a key is
            unknown; 413 for too many items.
    """
    plain = {str(k).lower(): v for k, v in headers.items() if isinstance(v, str)}
    check_headers(plain)
    payload, fields = _split_fields(row, headers, plain, item_keys)
    payload = _read_payload(payload, _content_types(row, headers, plain))
    raw = {**{OPTION_HEADERS[k]: v for k, v in plain.items() if k in OPTION_HEADERS}, **fields}
    envelope: Envelope = "single"
    items: tuple[Any, ...] = (payload,)
    request_id = None
    if isinstance(payload, dict):
        request_id = _read_id(payload.get("id"))
        raw.update(body_options(payload))
        items, envelope = split_items({k: v for k, v in payload.items() if k not in OPTION_NAMES})
        parameters = payload.get("parameters")
        if (envelope != "single" or item_keys is not None) and not isinstance(parameters, dict | None):
            raise RequestError(400, f"parameters: expected an object, got {type(parameters).__name__}")
        if envelope != "single":
            check_keys(payload, (*ENVELOPE_KEYS[envelope], *OPTION_NAMES), "")
            if envelope == "kserve_v2":
                check_tensors(payload)
        else:
            items = (_without(payload, OPTION_NAMES if item_keys is None else (*OPTION_NAMES, "parameters")),)
    elif isinstance(payload, list) and (lists_are_batches or _is_batch(payload)):
        items, envelope = checked_items(payload, "the list"), "list"
    several = len(items) > 1
    read = [_read_item(item, raw, item_keys, f"item {n}: " if several else "") for n, item in enumerate(items)]
    return Request(tuple(item for item, _ in read), tuple(own for _, own in read), envelope, request_id)


def _read_id(value: Any) -> str | None:
    """The id that KServe's answers repeat."""
    if isinstance(value, str) and len(value) > MOST_ID:
        raise RequestError(400, f"id: expected at most {MOST_ID} characters, got {len(value)}")
    return value if isinstance(value, str) else None


def _read_item(item: Any, raw: Mapping[str, Any], item_keys: Sequence[str] | None, where: str) -> tuple[Any, Options]:
    """An item without its options, and the options that hold for it."""
    try:
        if isinstance(item, dict):
            known = None if item_keys is None else (*item_keys, *OPTION_NAMES, "id")
            check_keys(item, known, "")
            raw = {**raw, **{k: item[k] for k in OPTION_NAMES if k in item}}
            item = _without(item, OPTION_NAMES)
        return item, read_options(raw)
    except RequestError as error:
        raise RequestError(error.status, f"{where}{error.message}") from None


def _without(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _is_batch(payload: list[Any]) -> bool:
    """Whether a list holds texts or objects, which no tensor does."""
    return bool(payload) and all(isinstance(item, (str, dict)) for item in payload)


def _split_fields(
    row: Mapping[str, Any], headers: Mapping[str, Any], plain: Mapping[str, str], item_keys: Sequence[str] | None
) -> tuple[Any, dict[str, Any]]:
    """The payload of a row, and the options among its multipart fields."""
    if plain.get("content-type", "").lower().startswith("application/x-www-form-urlencoded"):
        raise RequestError(
            400,
            "the body came as a form, whose encoding loses it; send a file with 'curl -T FILE', text with "
            "'curl -H \"Content-Type: text/plain\" --data-binary TEXT', or JSON with "
            "'curl --json JSON'",
        )
    twice = [name for name, value in row.items() if isinstance(value, SeveralParts)]
    if twice:
        raise RequestError(
            400,
            f"several parts are called '{str(twice[0])[:SHOWN]}'; send one part a request, or one JSON list of all "
            "(files as base64)",
        )
    fields = {k: v for k, v in row.items() if k in OPTION_NAMES}
    rest = {k: v for k, v in row.items() if k not in OPTION_NAMES}
    if not rest:
        raise RequestError(400, "the request has no body; send the input as the body or as a field 'data'")
    if len(rest) == 1:  # a single part is the payload, whatever it is called
        payload = next(iter(rest.values()))
    else:  # several are a JSON-like record
        check_keys(rest, item_keys, "multipart: ")
        if (item_keys is not None and sum(key in PAYLOAD_KEYS for key in rest) > 1) or _hold_files(rest):
            raise RequestError(
                400, f"expected one file, got the parts {', '.join(str(k)[:SHOWN] for k in rest)}; send one a request"
            )
        payload = {k: as_text(v) for k, v in rest.items()}
    if payload is None or (isinstance(payload, (bytes, bytearray, str)) and len(payload) == 0):
        raise RequestError(400, "the body is empty; send the input as the body or as a field 'data'")
    return payload, fields


def _hold_files(parts: Mapping[str, Any]) -> bool:
    """Whether more than one part is no text."""
    return sum(isinstance(as_text(value), bytes) for value in parts.values()) > 1


def _content_types(row: Mapping[str, Any], headers: Mapping[str, Any], plain: Mapping[str, str]) -> list[str]:
    """What the request and the fields that may be its payload say of themselves, in lower case."""
    # An option sent as JSON says nothing of the image beside it.
    kinds = [headers[k] for k in row if k not in OPTION_NAMES and isinstance(headers.get(k), Mapping)]
    return [
        str(kind).lower() for kind in (plain.get("content-type", ""), *(k.get("content-type", "") for k in kinds))
    ]


def _read_payload(payload: Any, types: Sequence[str]) -> Any:
    """What a body or a part holds: JSON where it says so or looks like it."""
    claims_json = any("json" in kind for kind in types)
    # TorchServe hands text/... over as text, text/json among it; any other text was a string of JSON.
    if isinstance(payload, str) and any(kind.startswith("text") for kind in types):
        text = payload.removeprefix("\ufeff")
        return _decode_json_bytes(text.encode("utf-8", "surrogatepass"), True) if claims_json else text
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return _decode_json_bytes(bytes(payload), claims_json)
    return payload


def _decode_json_bytes(payload: bytes, claims_json: bool) -> Any:
    """Parse bytes that claim to be JSON, or that are a JSON object or list without saying so (gRPC)."""
    payload = payload.removeprefix(BYTE_ORDER_MARK) if _begins_json(payload) or claims_json else payload
    if not claims_json and not _begins_json(payload):
        return payload
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        # A text may begin with a bracket ("[MASK] is ..."), an object never goes on as text.
        if not claims_json and payload.lstrip()[:1] == b"[":
            return payload
        raise RequestError(400, "the body is not valid JSON") from None


def _begins_json(payload: bytes) -> bool:
    return payload.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"[")


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
    short = message if len(message) <= MOST_MESSAGE else f"{message[: MOST_MESSAGE - 1]}…"
    return {"error": {"code": status, "message": short}}
