"""Turns a process into its age in seconds."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil


def seconds_since_process_start(pid: int | None = None) -> float:
    """Age of a process, by default this one: at the start of loading, what the interpreter and its imports took."""
    if not sys.platform.startswith("linux"):
        return time.time() - psutil.Process(pid).create_time()
    # psutil adds a boot time to the ticks since then, which Linux gives in whole seconds: up to 1 s too old.
    fields = Path(f"/proc/{pid or os.getpid()}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
