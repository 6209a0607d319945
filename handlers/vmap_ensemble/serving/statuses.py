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
