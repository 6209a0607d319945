"""Turns paths into keys that sort them as people number them."""

from __future__ import annotations

import re
from pathlib import Path


def natural(path: Path) -> list[tuple[int, int, str]]:
    """seed2 before seed10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(part), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts]
