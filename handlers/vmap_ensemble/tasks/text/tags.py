"""Turns the tags of words, in whatever scheme the labels follow, into entities.

    BIO, IOB    B begins, I goes on (or begins, after another kind)
    BILOU       L is the last word of an entity, U the only one
    BIOES       E is the last word, S the only one; BMES, BMEWO likewise
    IO          I alone, or kinds without any letter: neighbours of one kind are one entity

Letters stand before (`B-PER`, `B_PER`, `B:PER`), behind (`PER-B`) or alone (`B`, `I`, `O`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

BEGINS, UNITS, LAST = "B", "USW", "LE"
LETTERS = BEGINS + "IM" + LAST + UNITS
# What an entity is called where the labels are letters alone.
ONLY_KIND = "entity"
# What stands between a letter and its kind.
BETWEEN = r"[-_:./|]"
PATTERNS = {
    "prefix": re.compile(rf"(?P<letter>[{LETTERS}]){BETWEEN}(?P<kind>.+)", re.IGNORECASE),
    "suffix": re.compile(rf"(?P<kind>.+){BETWEEN}(?P<letter>[{LETTERS}])", re.IGNORECASE),
    "alone": re.compile(rf"(?P<letter>[{LETTERS}])(?P<kind>)"),
}


@dataclass(frozen=True)
class Tag:
    """What a label says of a word: its kind, None outside of entities, and its letter, upper case or empty."""

    kind: str | None
    letter: str = ""


class TagScheme:
    """How a set of labels is read.

    Args:
        labels: All labels of a model. A scheme is theirs if it has B or I and at least half of them follow it; labels
            that don't are kinds without a letter.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        inside = {label for label in labels if not is_outside(label)}
        self._pattern = next((p for p in PATTERNS.values() if _follows(inside, p)), None)

    def read(self, label: str) -> Tag:
        """The tag that a label stands for."""
        if is_outside(label):
            return Tag(None)
        match = self._pattern.fullmatch(label) if self._pattern else None
        return Tag(match["kind"] or ONLY_KIND, match["letter"].upper()) if match else Tag(label)


def is_outside(label: str) -> bool:
    """Whether a label says that a word belongs to no entity."""
    return label.upper() in ("O", "")


def _follows(labels: set[str], pattern: re.Pattern[str]) -> bool:
    matches = [match for label in labels if (match := pattern.fullmatch(label))]
    letters = {match["letter"].upper() for match in matches}
    return bool(letters & {"B", "I"}) and 2 * len(matches) >= len(labels)


@dataclass
class Span:
    """An entity while its words are gathered."""

    kind: str
    start: int
    end: int
    probabilities: list[float] = field(default_factory=list)
    information: list[float] = field(default_factory=list)
    # (token, label) of each word's first token
    places: list[tuple[int, int]] = field(default_factory=list)


class SpanJoiner:
    """Gathers words, in the order of the text, into spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._open: Span | None = None  # the span that a following word may join
        self._last: Span | None = None  # the span of the last word, for the word's further tokens

    def word(self, tag: Tag, start: int, end: int) -> Span | None:
        """Add a word's first token; the span that it belongs to, None outside of entities."""
        if tag.kind is None:
            self._open = self._last = None
            return None
        span = self._open
        if span is None or span.kind != tag.kind or tag.letter in tuple(BEGINS + UNITS):
            span = Span(tag.kind, start, end)
            self.spans.append(span)
        span.end = end
        self._last = span
        self._open = None if tag.letter in tuple(LAST + UNITS) else span
        return span

    def go_on(self, end: int) -> None:
        """Add a further token of the last word."""
        if self._last is not None:
            self._last.end = end
