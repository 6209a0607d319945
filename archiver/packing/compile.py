"""Turns the staged files of an archive into native code of its forward, beside them: compiled/*.pt2.

The members are loaded as a worker does; what compiles them is vmap_ensemble.execution.compiled.native_code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from torch import Tensor

from archiver.blocks.request import ArchiveRequest
from archiver.packing.staged import open_task
from vmap_ensemble.core.forward import EnsembleForward, as_one_vmap
from vmap_ensemble.errors import ArchiveError, LoadError
from vmap_ensemble.execution.compiled.native_code import reasons_against, write_native_code
from vmap_ensemble.execution.compiled.packages import Package
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.tasks.task import Task

Step = Callable[[str], None]


def compile_archive(handler: type[Task], request: ArchiveRequest, stage: Path, step: Step) -> list[Package]:
    """Compile the forward of staged members for batches of 1 and of up to batchSize, and write compiled/.

    Args:
        handler: The handler's class.
        request: Names the model-config yaml.
        stage: The archive's root, complete.
        step: Called with a line before each compilation.

    Raises:
        ArchiveError: There is no C++ compiler, the handler's model doesn't take one tensor and give one, or it
            can't be compiled.
    """
    check_compiler()
    forward, examples = _load(handler, stage)
    try:
        return write_native_code(forward, examples, _batch_size(request), stage, step)
    except LoadError as error:
        raise ArchiveError(f"--compile: {error}") from error


def check_compiler() -> None:
    """Refuse to begin without a C++ compiler.

    Raises:
        ArchiveError: AOTInductor finds none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # here: the compiler's import takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ArchiveError(
            "--compile: needs a C++ compiler on the PATH (g++ or clang++), found none; install one, or leave "
            "--compile away and let the worker choose another way"
        ) from None


def _load(handler: type[Task], stage: Path) -> tuple[EnsembleForward, Tensor]:
    """The forward as the task makes it, and two examples (2, ...)."""
    task = open_task(handler, stage)
    forward = task.make_forward(Phases())
    args = task.collate(task.sample_examples(2))
    reasons = "; ".join(reasons_against(forward, args))
    if reasons:
        raise ArchiveError(
            "--compile: expected a model in floating point that takes one tensor and gives one, as image classifiers "
            f"do; {handler.__name__} serves another, which can't be compiled ahead of time ({reasons})"
        )
    return as_one_vmap(forward), args[0]


def _batch_size(request: ArchiveRequest) -> int:
    if request.model_config is None:
        return 1
    config = yaml.safe_load(request.model_config.read_text(encoding="utf-8")) or {}
    return max(1, int(config.get("batchSize") or 1))
