"""Turns one item of a request into a checked text, pair of texts, or question with context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmap_ensemble.errors import TooLargeItem, UnreadableItem

TEXT_KEYS = ("text", "data", "body")


@dataclass(frozen=True)
class TextInput:
    """A text, and the second one of a pair; for questions, `text` is the question and `pair` the context."""

    text: str
    pair: str | None = None


def read_text_item(item: Any, max_characters: int, pairs: bool = True) -> TextInput:
    """Read a text, or {"text": …}, {"text": …, "text_pair": …}.

    Args:
        item: What a request holds.
        max_characters: Longest text.
        pairs: Whether a second text is read; else one is refused.

    Raises:
        ItemError: where there is no proper text or one too many, 413 where it is too long.
    """
    if not isinstance(item, Mapping):
        return TextInput(read_text(item, "text", max_characters))
    keys = [key for key in TEXT_KEYS if key in item]
    if not keys:
        raise UnreadableItem('expected a text, or a JSON object {"text": …} with "text_pair" for pairs')
    pair = item.get("text_pair")
    if len(keys) > 1 or (pair is not None and not pairs):
        given = ", ".join([*keys, *(["text_pair"] if pair is not None else [])])
        raise UnreadableItem(f"expected one text, got {given}; send one an item")
    second = None if pair is None else read_text(pair, "text_pair", max_characters)
    return TextInput(read_text(item[keys[0]], keys[0], max_characters), second)


def read_question_item(item: Any, max_characters: int) -> TextInput:
    """Read {"question": …, "context": …}.

    Raises:
        ItemError: where a key is missing or no proper text, or there is another text; 413 where one is too long.
    """
    if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
        raise UnreadableItem('expected a JSON object {"question": …, "context": …}')
    others = [key for key in (*TEXT_KEYS, "text_pair") if key in item]
    if others:
        raise UnreadableItem(f"expected a question and its context, got {', '.join(others)} beside them")
    return TextInput(
        read_text(item["question"], "question", max_characters), read_text(item["context"], "context", max_characters)
    )


def read_text(value: Any, name: str, max_characters: int) -> str:
    """Check one text: UTF-8, not empty, no NUL bytes or lone surrogates, not too long.

    Raises:
        ItemError: 400, or 413 where it is too long.
    """
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode("utf-8-sig")  # a byte order mark is no part of the text
        except UnicodeDecodeError:
            raise UnreadableItem(f"{name}: expected UTF-8") from None
    if not isinstance(value, str):
        raise UnreadableItem(f"{name}: expected text, got {type(value).__name__}")
    if len(value) > max_characters:
        raise TooLargeItem(f"{name}: {len(value)} characters; at most {max_characters} are read")
    if not value.strip():
        raise UnreadableItem(f"{name}: the text is empty")
    if "\0" in value:
        raise UnreadableItem(f"{name}: the text holds NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UnreadableItem(f"{name}: the text holds lone surrogates, which are no characters")
    return value
