"""Turns errors of the other layers into HTTP statuses: one table."""

from __future__ import annotations

from vmap_ensemble.errors import (
    ItemError,
    NoAnswer,
    NotOffered,
    OutOfMemory,
    RequestError,
    TooLargeItem,
    UnfitItem,
    UnknownKind,
    UnreadableItem,
)

STATUSES: dict[type[ItemError], int] = {
    UnreadableItem: 400,
    TooLargeItem: 413,
    UnknownKind: 415,
    UnfitItem: 422,
    NoAnswer: 500,
    NotOffered: 501,
    OutOfMemory: 507,
}


def status_of(error: ItemError) -> int:
    """The status of an error: its own, or that of the nearest class that the table knows; 500 otherwise."""
    if isinstance(error, RequestError):
        return error.status
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)


# Status -> what it means here, in one word: what refusals are counted by. A server may add others.
REASONS: dict[int, str] = {
    400: "unreadable",
    413: "too_large",
    415: "unknown_kind",
    422: "unfit",
    500: "failed",
    501: "not_offered",
    507: "out_of_memory",
}


def reason_of(status: int) -> str:
    """Why a request with this status was refused; `other` for those that a handler of one's own made up."""
    return REASONS.get(status, "other")
