"""Turns the N members of an archive into N narrower ones of one shape, or into ones with zeros for weights."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from optimise.prune.command import main as run

    return run(arguments)
