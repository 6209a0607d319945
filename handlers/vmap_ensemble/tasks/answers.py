"""Turns what a task finds about one example into an answer, and answers into JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps makes one for each call


@dataclass(frozen=True)
class Options:
    """What a client may ask for beside the prediction."""

    detail: bool = False
    subset: tuple[str, ...] | None = None
    top_k: int | None = None
    target: tuple[str | int, ...] | None = None


def dump_json(reply: Any) -> str:
    """Serialise a reply, strictly: NaN and unknown types raise ValueError or TypeError."""
    text = _ENCODER.encode(reply)
    if text.isascii():
        return text
    # A lone surrogate that a reply quotes from its request would fail in the worker, with the whole batch.
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Answer:
    """The answer to one example, and what its metrics need."""

    body: dict[str, Any]
    mutual_information: float | None = None
    left_out: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The body as JSON: the text that a server sends."""
        return dump_json(self.body)
