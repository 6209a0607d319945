"""Turns an answer's JSON into an object with what most callers read, and an error's into an exception."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Item = Path | bytes | str | Mapping[str, Any]


class Refused(Exception):
    """The server has no answer to a request.

    Args:
        status: HTTP status; 0 where no server could be reached, or none answered in time.
        message: What the server says is wrong.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        body: All that the server says: docs/answer.schema.json.
        label: Of the prediction; None where the answer is no classification.
        probability: Of this label.
        mutual_information: How far the members disagree, in nats; None where the answer doesn't say.
        abstains: Whether the answer says not to trust it.
    """

    body: Mapping[str, Any]
    label: str | None = None
    probability: float | None = None
    mutual_information: float | None = None
    abstains: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Prediction:
        """Read what is there: modes differ in what they answer."""
        top = body.get("prediction")
        top = top if isinstance(top, Mapping) else {}
        uncertainty = body.get("uncertainty")
        information = uncertainty.get("mutual_information") if isinstance(uncertainty, Mapping) else None
        abstains = body.get("abstain") is True
        return cls(body, top.get("label"), top.get("probability"), information, abstains)


def body_of(item: Item | Sequence[Item]) -> tuple[bytes, str]:
    """What is sent for an item or a list of them, and its content type.

    Args:
        item: A path or the bytes of a file; a text; an object of keys; or a list of these, which is one request.
    """
    if isinstance(item, Path):
        item = item.read_bytes()
    if isinstance(item, bytes):
        return item, "application/octet-stream"
    value = _in_json(item) if isinstance(item, str | Mapping) else [_in_json(part) for part in item]
    return json.dumps(value).encode(), "application/json"


def _in_json(item: Item) -> Any:
    if isinstance(item, Path):
        item = item.read_bytes()
    if isinstance(item, bytes):
        return {"b64": base64.b64encode(item).decode()}
    return {"text": item} if isinstance(item, str) else item


def options_of(detail: bool, subset: Sequence[str] | None, top_k: int | None) -> dict[str, str]:
    """Option -> value, as headers and gRPC's inputs have it."""
    options = {"detail": "members"} if detail else {}
    if subset is not None:
        options["subset"] = ",".join(subset)
    if top_k is not None:
        options["top_k"] = str(top_k)
    return options


def read_answer(status: int, text: str) -> Any:
    """An answer's JSON.

    Raises:
        Refused: It is an error's.
    """
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, Mapping) else None
    if isinstance(error, Mapping):  # over gRPC, which has no status of its own, as well
        raise Refused(int(error.get("code", status)), str(error.get("message", "")))
    if status != 200 or body is None:
        told = body.get("message") if isinstance(body, Mapping) else None  # TorchServe's own words
        raise Refused(status, str(told or text[:200]))
    return body


def predictions_of(body: Any) -> Prediction | list[Prediction]:
    """One answer, or one for each item of a list."""
    return [Prediction.of(part) for part in body] if isinstance(body, list) else Prediction.of(body)
