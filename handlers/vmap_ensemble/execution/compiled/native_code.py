"""Turns a forward into native code for this machine: compiled/*.pt2, by torch.export and AOTInductor.

    unrolled members -> export -> Inductor, weights frozen into the code

`./archive.sh --compile` puts the files into an archive; a worker that is asked to compile makes them at load. One
example has code of its own, since code for any batch size is slower on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmap_ensemble.archive.manifest import hash_file
from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.compiled.packages import (
    COMPILED_FOLDER,
    CompiledForward,
    Package,
    target_here,
    write_compiled,
)
from vmap_ensemble.execution.compiled.unrolled import unroll
from vmap_ensemble.execution.quiet import quietly

# Freezing folds batch norm and packs weights for oneDNN; threads are the worker's, not the compiling machine's.
INDUCTOR_OPTIONS = {"freezing": True, "cpp.dynamic_threads": True}


def reasons_against(forward: Forward, args: tuple[Any, ...]) -> list[str]:
    """Why native code can't be made of a forward; empty if it can.

    Args:
        forward: The members' forward.
        args: Arguments of a batch.
    """
    if forward.one_vmap is None:
        return [f"{type(forward).__name__} is more than one call of vmap"]
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return ["its model takes more than one tensor"]
    with torch.no_grad():
        output = forward.member(0, *args)
    return [] if isinstance(output, Tensor) else ["its model gives more than one tensor"]


def write_native_code(
    forward: EnsembleForward, examples: Tensor, largest: int, folder: Path, step: Callable[[str], Any] = str
) -> list[Package]:
    """Compile the forward for batches of 1 and of 2 to `largest`, and write `folder`/compiled.

    Args:
        forward: One that `reasons_against` has nothing against.
        examples: A batch (B, ...) of any size.
        largest: Most examples of a batch.
        folder: The archive's root, or an empty folder.
        step: Called with a line before each compilation.

    Raises:
        LoadError: It can't be compiled; the text has the compiler's first line.
    """
    (folder / COMPILED_FOLDER).mkdir()
    packages = []
    two = torch.cat([examples, examples])[:2]
    with torch.inference_mode(False), torch.no_grad():
        module = unroll(forward)
        for smallest, last in [(1, 1), *([(2, largest)] if largest > 1 else [])]:
            step(f"compile for batches of {smallest} to {last}")
            packages.append(_compile(module, two, smallest, last, folder))
    write_compiled(folder, target_here(forward.members, examples.shape[1:]), packages)
    return packages


def compile_here(forward: EnsembleForward, batches: list[Tensor]) -> CompiledForward:
    """Compile the forward at load, for batches of up to the largest of those given.

    Raises:
        LoadError: As `write_native_code`.
    """
    largest = max(batches, key=len)
    with tempfile.TemporaryDirectory(prefix="vmap-ensemble-") as folder:
        write_native_code(forward, largest, len(largest), Path(folder))
        return CompiledForward(Path(folder), forward.members, largest.shape[1:])


def _compile(module: nn.Module, examples: Tensor, smallest: int, largest: int, folder: Path) -> Package:
    file = f"{COMPILED_FOLDER}/batch-{smallest}-{largest}.pt2"
    dynamic = None
    if smallest < largest:
        dynamic = (({0: torch.export.Dim("batch", min=smallest, max=largest)},),)
    with _quiet_compiler():
        try:
            program = torch.export.export(module, (examples[:smallest].clone(),), dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / file), inductor_configs=INDUCTOR_OPTIONS
            )
        except Exception as error:
            # Whatever a compiler may raise; its text names the operator or the line.
            raise LoadError(f"{type(error).__name__}: {first_line(error)}") from error
    path = folder / file
    return Package(file, smallest, largest, hash_file(path), path.stat().st_size)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """A cache of its own, which is removed, and none of the compiler's warnings."""
    from torch._inductor.utils import fresh_cache  # here: the compiler's import takes seconds

    with fresh_cache(), quietly("torch._inductor", "torch.export"):
        yield
