"""Turns what a task finds about one example into an answer, and answers into JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmap_ensemble.archive.identity import Identity

# A float32 has no more; what follows comes from its conversion to Python's float.
DIGITS = 7
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
    """The answer to one example, and what its metrics need.

    Attributes:
        body: What a client gets.
        mutual_information: In nats; None where the mode has none.
        left_out: Members whose output was not finite.
        dissenting: Members that alone would have answered with another class.
    """

    body: dict[str, Any]
    mutual_information: float | None = None
    left_out: tuple[str, ...] = ()
    dissenting: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The body as JSON: the text that a server sends."""
        return dump_json(self.body)


def significant(value: Any) -> Any:
    """An answer's body with the digits that mean something: a third is 0.3333333 and not 0.3333333432674408."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: significant(part) for key, part in value.items()}
    return [significant(part) for part in value] if isinstance(value, list) else value


def sign(body: dict[str, Any], archive: Identity | None, hashes: Mapping[str, str]) -> None:
    """Say in an answer or explanation which archive gave it, and which file each of the members is that it tells of.

    Args:
        body: Gets `archive`, and `sha256` in the rows of `members`.
        archive: None for members in memory, which have neither.
        hashes: Name of a member -> SHA-256 of its file.
    """
    if archive is not None:
        body["archive"] = dataclasses.asdict(archive)
    parts = (body, *body.get("explanations", ())) if hashes else ()
    for row in (row for part in parts for row in part.get("members", ())):
        if hashes.get(row.get("name")):
            row["sha256"] = hashes[row["name"]]
