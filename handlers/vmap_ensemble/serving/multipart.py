"""Turns the bytes of a body into a request's fields, as TorchServe hands them over; with Python's own library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import Parser
from typing import Any

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.requests import SeveralParts

# A request has a payload or a few, and its options; a part's head has two lines or three.
MOST_PARTS, MOST_HEAD_BYTES = 64, 4096


def read_fields(body: bytes, headers: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a body into its fields: `body`, or those of a multipart form.

    Args:
        body: As it was sent.
        headers: Of the request, by names in lower case.

    Returns:
        Field -> bytes, text where it says that it is text, or JSON where it says so and is; and the headers, among
        which each field's own stand under its name.

    Raises:
        RequestError: 400 for a form that can't be read, or whose end is missing; 413 for too many parts.
    """
    kind = headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        return {"body": _read_value(body, kind)}, {"body": {"content-type": kind}, **headers}
    fields: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, part_kind, value in _parts(body, kind):
        read = _read_value(value, part_kind)
        if name in fields:
            # A client would get one answer to two files without a word: `read_request` refuses them.
            before = fields[name]
            read = SeveralParts([*(before if isinstance(before, SeveralParts) else [before]), read])
        fields[name], own[name] = read, {"content-type": part_kind}
    return fields, {**own, **headers}


def _read_value(value: bytes, kind: str) -> Any:
    """As TorchServe reads values of these types (ts/protocol/otf_message_handler.py)."""
    try:
        if kind == "application/json":
            return json.loads(value)
        if kind.startswith("text"):
            return value.decode("utf-8")
    except (ValueError, RecursionError):
        pass  # it isn't what it says: who reads the request tells the client
    return value


def _parts(body: bytes, kind: str) -> Iterator[tuple[str, str, bytes]]:
    """Name, content type and value of each part of a form."""
    boundary = _boundary(kind)
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MOST_PARTS + 2)
    if len(pieces) > MOST_PARTS + 2:
        raise RequestError(413, f"multipart: expected at most {MOST_PARTS} parts")
    # Without its end a part may be missing, an option among them, and all members would answer.
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise RequestError(400, "multipart: the form doesn't end with its boundary")
    for piece in pieces[1:-1]:
        # The boundary's own line may end in blanks.
        line, _, rest = piece.partition(b"\r\n")
        head, found, value = rest.partition(b"\r\n\r\n")
        if line.strip(b" \t") or not found or len(head) > MOST_HEAD_BYTES:
            raise RequestError(400, "multipart: a part without headers")
        told = Parser().parsestr(head.decode("utf-8", "replace") + "\r\n\r\n", headersonly=True)
        name = _parameter(told, "name")
        if told.get_content_disposition() != "form-data" or not name:
            raise RequestError(400, "multipart: expected a name for each part")
        yield name, _content_type(told), value


def _boundary(kind: str) -> bytes:
    told = Message()
    told["content-type"] = kind
    boundary = told.get_boundary()
    if not boundary or len(boundary) > 200:
        raise RequestError(400, "multipart: expected a boundary in Content-Type")
    return boundary.encode("latin-1", "replace")


def _content_type(told: Message) -> str:
    """What a part says of itself; one without a file's name says nothing that TorchServe would hear."""
    return str(told.get("content-type") or "") if _parameter(told, "filename") is not None else ""


def _parameter(told: Message, name: str) -> str | None:
    value = told.get_param(name, header="content-disposition")
    if isinstance(value, tuple):  # RFC 2231: charset, language, value
        value = value[2]
    return None if value is None else str(value)
