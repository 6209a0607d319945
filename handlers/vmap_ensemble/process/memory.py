"""Turns glibc's habits of handing memory back into those that a server's forwards want."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
_MALLOC_OPTIONS = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26))


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next forward, instead of handing them back to the system each time.

    A forward allocates the same tensors for every batch; each page handed back costs a page fault when it is asked
    for again: a third of the time of a batch of 8 texts of 128 tokens. A block that was freed stays the process's.

    Returns:
        Whether there was a glibc to tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return all(mallopt(option, size) for option, size in _MALLOC_OPTIONS)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Hand back what loading has freed: what `keep_freed_memory` keeps is meant for the tensors of a forward.

    Graphs refer to each other in circles, so garbage is collected first: among what was made inside of this context,
    since looking at the half a million objects of the imports would take 0.2 s.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
