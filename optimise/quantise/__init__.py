"""Turns an archive of encoders into one whose layers run in 8 bits, and tells what that costs."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from optimise.quantise.command import main as run

    return run(arguments)
