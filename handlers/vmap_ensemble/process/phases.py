"""Turns the steps of a start into the seconds that each took, under names that whoever shows them shares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

IMPORT = "import"
SETTINGS = "settings"
READ = "read"
LIBRARY = "library"
BUILD = "build"
STACK = "stack"
PREPARE = "prepare"
QUANTISE = "quantise"
EXECUTION = "execution"
EQUIVALENCE = "equivalence"
FIRST_REQUEST = "first_request"


class Phases:
    """Seconds of each phase of a start, in the order in which they began.

    Attributes:
        seconds: Name of the phase -> seconds; a phase that is entered twice adds up.

    Example:
        >>> phases = Phases()
        >>> with phases(STACK):
        ...     members = load_members(folder)
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what is done inside as this phase's."""
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        yield
        self.seconds[name] += time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """Seconds to the millisecond, for a description."""
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}
