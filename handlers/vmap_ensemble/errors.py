"""Turns what can go wrong into one small family of exceptions, so that callers catch by meaning."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path


class EnsembleError(Exception):
    """Root of every error this project raises on purpose; its text is one clear line."""


class SettingsError(EnsembleError):
    """A settings file holds an unknown, missing or wrong value."""


class MemberError(EnsembleError):
    """A member can't be read, or doesn't fit the architecture or the other members."""


class OtherArchitecture(MemberError):
    """A member that was read whole has keys or shapes of another architecture, and nothing else explains them."""


class LoadError(EnsembleError):
    """An archive can't be loaded or fails the proof that its forward equals the members' own."""


class ArchiveError(EnsembleError):
    """An archive can't be built as asked."""


class NetworkError(ArchiveError):
    """Weights can't be fetched."""


class ItemError(EnsembleError):
    """One item can't be answered; its neighbours in the batch can. The text reaches whoever sent the item."""

    @property
    def message(self) -> str:
        """What whoever sent the item is told."""
        return str(self)


class UnreadableItem(ItemError):
    """It is empty, broken, or lacks what its kind needs."""


class TooLargeItem(ItemError):
    """It is more than the settings allow."""


class UnknownKind(ItemError):
    """It is of another kind than what is served: text where images are, or an unknown file format."""


class UnfitItem(ItemError):
    """It can be read, and says what can't be done: a wrong shape, an unknown member or label."""


class NotOffered(ItemError):
    """What is asked of it isn't served here."""


class NoAnswer(ItemError):
    """No member gives a finite output for it."""


class OutOfMemory(ItemError):
    """There is not enough memory for it alone."""


class RequestError(ItemError):
    """One request of a server can't be answered; its neighbours in the batch can.

    Args:
        status: HTTP status of this request alone, 400 to 599.
        message: What is wrong and how to mend it. It reaches the client, so it names no path of the server.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RequestError], tuple[int, str]]:
        # Copied, and brought over from another process, with both; an exception alone would keep its text.
        return type(self), (self.status, self.message)


def numbered(error: ItemError, number: int) -> ItemError:
    """The same error, whose text begins with the number of the item in its list."""
    told = copy.copy(error)
    told.args = (f"item {number}: {error}",)
    return told


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def where(error: Exception) -> str:
    """Type and innermost frames of an error, without its text, which may quote the request."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} in " + " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )
