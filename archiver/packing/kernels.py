"""Turns the kernels' source into libraries in an archive, so that a worker needs no compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

from archiver import HANDLERS
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.kernel_library import CACHE, INSTRUCTION_SETS, SOURCES, build_library, runs_kernels


def add_kernels(stage: Path) -> str | None:
    """Put a library for each instruction set beside the source in the archive's root.

    Args:
        stage: The root, which holds the shared package.

    Returns:
        None; or, where no library can be made, one line that says why. The archive serves without them, slower.
    """
    if not runs_kernels():
        return "they are for Linux on x86-64 CPUs"
    try:
        for target in INSTRUCTION_SETS.values():
            shutil.copyfile(build_library(target, CACHE), stage / SOURCES.relative_to(HANDLERS) / target.file)
    except LoadError as error:
        return str(error)
    return None
