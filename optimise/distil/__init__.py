"""Turns the N members of an archive into one network, or into N heads on one trunk, that answer nearly the same."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from optimise.distil.command import main as run

    return run(arguments)
