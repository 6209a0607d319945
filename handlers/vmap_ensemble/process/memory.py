"""Turns glibc's habits of handing memory back into those that a server's forwards want."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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
    _trim()


def _trim() -> None:
    """Hand what is free back to the system, where glibc can be told to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def measure_peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call holds at its peak beyond what is held before it.

    Of a CPU they are pages of the process, so that kernels' own buffers count; of a GPU what torch's allocator gives.

    Args:
        run: Called once; what is made at the first call only should exist.
        device: Where it computes.

    Returns:
        The bytes; None where the system doesn't tell, as anywhere but on Linux.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak is what is held now
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, StopIteration):  # no Linux, or one that shows a process less of itself
        return None


def _status_bytes(key: str) -> int:
    """A size of /proc/self/status, which is in KiB there."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
