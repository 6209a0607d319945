"""Turns settings and TorchServe's context into the device, dtype and threads that a worker runs with."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from vmap_ensemble.settings import Settings
from vmap_ensemble.threads import cores_at_hand, threads_per_worker

# malloc.h's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
_MALLOC_OPTIONS = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26))

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What workers keep between starts.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmap-ensemble"


@dataclass(frozen=True)
class Runtime:
    """Where and how a worker computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int


def configure_torch(settings: Settings, gpu_id: int | None, model_config: Mapping[str, Any]) -> Runtime:
    """Set torch's threads and float32 precision for this process, and tell device and dtype.

    Args:
        settings: The archive's settings.
        gpu_id: The GPU that TorchServe gave this worker, or None.
        model_config: The model-config yaml.
    """
    default = f"cuda:{gpu_id}" if torch.cuda.is_available() and gpu_id is not None else "cpu"
    threads = settings.threads or threads_per_worker(model_config, cores_at_hand())
    torch.set_num_threads(threads)
    keep_freed_memory()
    # TorchServe's base handler turns TF32 on at import on Ampere and later; the settings decide here.
    torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    torch.backends.cudnn.allow_tf32 = settings.float32_matmul_precision != "highest"
    runtime = Runtime(torch.device(settings.device or default), DTYPES[settings.dtype], threads)
    if settings.dtype == "fp16" and runtime.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        logger.warning("this CPU has no float16 kernels: fp16 is far slower here than fp32; see docs/precision.md")
    return runtime


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


def quieten_worker() -> None:
    """Drop the line that ts/protocol/otf_message_handler.py logs per batch: under load Java reads every one."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("vmap_ensemble", "ts.metrics"):  # metrics are log lines, too
        logging.getLogger(name).setLevel(logging.INFO)


def seconds_since_process_start(pid: int | None = None) -> float:
    """Age of a process, by default this one: at the start of loading, what the interpreter and its imports took."""
    if not sys.platform.startswith("linux"):
        return time.time() - psutil.Process(pid).create_time()
    # psutil adds a boot time to the ticks since then, which Linux gives in whole seconds: up to 1 s too old.
    fields = Path(f"/proc/{pid or os.getpid()}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
