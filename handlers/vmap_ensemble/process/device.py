"""Turns names of devices and dtypes, and a number of threads, into what this process computes with."""

from __future__ import annotations

import itertools
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.process.memory import keep_freed_memory

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
# What x86 and ARM call the make of a processor there, and how the names of instructions that compute begin.
_MODEL_KEYS = ("cpu family", "model", "CPU implementer", "CPU part")
_COMPUTING = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "bf16", "i8mm", "fphp")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def configure_torch(threads: int, float32_matmul_precision: str) -> None:
    """Set torch's threads and float32 precision for this process, and let it keep the memory that it frees.

    Args:
        threads: Of torch's operators.
        float32_matmul_precision: `highest`, or `high` or `medium`, which admit TF32 in products and convolutions.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    set_float32_precision(float32_matmul_precision)


def set_float32_precision(precision: str) -> None:
    """Let float32 products and convolutions of this process use TF32 or not: `highest`, `high` or `medium`."""
    # TorchServe's base handler turns TF32 on at import on Ampere and later, and torch's convolutions have it on by
    # default; the settings decide here.
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def choose_device(name: str | None, gpu_id: int | None = None) -> torch.device:
    """The device of a name; without one the GPU of this number, where there is a GPU, or else the CPU."""
    default = f"cuda:{gpu_id}" if torch.cuda.is_available() and gpu_id is not None else "cpu"
    return torch.device(name or default)


def has_float16_kernels() -> bool:
    """Whether this CPU multiplies float16; the one question to oneDNN that is asked here, below its module."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name (`fp32`, `fp16`, `bf16`), with a warning where the device has no kernels for it."""
    if name == "fp16" and device.type == "cpu" and not has_float16_kernels():
        logger.warning("this CPU has no float16 kernels: fp16 is far slower here than fp32; see docs/precision.md")
    return DTYPES[name]


def cpu_name() -> str:
    """What the processor is called: its model where Linux tells one, else its kind."""
    return _first_processor().get("model name") or platform.processor() or platform.machine()


def cpu_kind() -> dict[str, Any]:
    """What tells processors of which one computes as another does: a virtual one's name alone may hide its make."""
    told = _first_processor()
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {
        "name": cpu_name(),
        "model": [told[key] for key in _MODEL_KEYS if key in told],
        "instructions": sorted(flag for flag in flags if flag.startswith(_COMPUTING)),
    }


def _first_processor() -> dict[str, str]:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    rows = (line.partition(":") for line in itertools.takewhile(str.strip, lines))
    return {key.strip(): value.strip() for key, _, value in rows}
