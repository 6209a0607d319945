"""Turns answers of /explanations/ into cards: what each word adds to an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Blue and orange are told apart by most who can't tell red from green.
FOR, AGAINST = (43, 108, 196), (226, 122, 28)
STRONGEST = 0.78
SUMMARY_KEYS = ("label", "entity", "token", "answer")


class RenderError(Exception):
    """The answer can't be rendered; the text is one line that says why."""


@dataclass(frozen=True)
class Word:
    """A word, the importance it has, and whether a space, or another of the request's texts, comes before it."""

    text: str
    importance: float
    spaced: bool
    of: str
    begins_text: bool


@dataclass(frozen=True)
class Card:
    """One explanation.

    Attributes:
        title: What is explained.
        facts: Names and values below the title.
        words: The text.
        scale: The importance that has the full colour.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    words: tuple[Word, ...]
    scale: float

    def colour(self, importance: float) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255, of the paper behind a word."""
        strength = STRONGEST * min(1.0, abs(importance) / self.scale)
        red, green, blue = (round(255 + strength * (c - 255)) for c in (FOR if importance > 0 else AGAINST))
        return red, green, blue


def read_answers(text: str) -> list[dict[str, Any]]:
    """The bodies in what /explanations/ answered: one, a list, or those of a KServe v1 or v2 body.

    Raises:
        RenderError: It is no JSON, an error, or no explanation.
    """
    try:
        answer = json.loads(text)
        if isinstance(answer, dict) and isinstance(answer.get("outputs"), list):
            answer = [json.loads(row) for output in answer["outputs"] for row in output["data"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RenderError(f"expected JSON ({error})") from None
    if isinstance(answer, dict):
        if isinstance(answer.get("error"), dict):
            raise RenderError(f"the answer is an error: {answer['error'].get('message')}")
        answer = answer.get("predictions", [answer])
    if not isinstance(answer, list) or not all(isinstance(b, dict) and "explanations" in b for b in answer):
        raise RenderError("expected the answer of /explanations/, got another JSON")
    return answer


def make_cards(body: Mapping[str, Any]) -> list[Card]:
    """One card per explanation of a body; they share a scale, so that their colours compare.

    Raises:
        RenderError: A key is missing or holds something else than it should.
    """
    try:
        rows = [(row, [float(value) for value in row["importances"]]) for row in body["explanations"]]
        size = max((abs(value) for _, values in rows for value in values), default=0.0)
        if not math.isfinite(size):
            raise ValueError("an importance is not finite")
        return [_card(row, values, str(body["explains"]), size or 1.0) for row, values in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RenderError(f"expected the answer of /explanations/; {type(error).__name__}: {error}") from None


def _card(row: Mapping[str, Any], importances: list[float], explains: str, scale: float) -> Card:
    about = next((f"{row[key]}" or "no answer" for key in SUMMARY_KEYS if key in row), "")
    detail = f" {row['text']!r}" if "entity" in row else ""
    place = f" ({row['position']})" if "position" in row else f" for mask {row['mask'] + 1}" if "mask" in row else ""
    facts = (
        (explains.replace("_", " "), f"{float(row['value']):.4f}"),
        ("without the words", f"{float(row['baseline']):.4f}"),
        ("delta", f"{float(row['delta']):+.1e}"),
        ("full colour", f"±{scale:.4f}"),
    )
    words = []
    previous: Mapping[str, Any] = {}
    for word, importance in zip(row["words"], importances, strict=True):
        begins = word["of"] != previous.get("of")
        spaced = not begins and word["start"] > previous.get("end", 0)
        words.append(Word(str(word["word"]), importance, spaced, str(word["of"]), begins))
        previous = word
    return Card(f"{about}{detail}{place}", facts, tuple(words), scale)
