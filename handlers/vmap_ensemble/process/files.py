"""Turns a file that is being written into one that is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path beside it, to be written to; at the end it takes the file's place, after an error it is gone."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
