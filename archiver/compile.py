"""Turns the staged files of an archive into native code of its forward, beside them: compiled/*.pt2.

    load the members as a worker does -> unroll -> torch.export -> AOTInductor, weights frozen into the code

The unrolled members are what is compiled: on a CPU convolutions of many members become grouped ones under vmap,
which no compiler makes fast again. One example has code of its own, since code for any batch size is slower on it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from archiver.blocks import ArchiveRequest
from vmap_ensemble.ahead_of_time import COMPILED_FOLDER, Package, target_here, write_compiled
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.members import hash_file
from vmap_ensemble.settings import load_settings

Step = Callable[[str], None]


class Unrolled(nn.Module):
    """All members one after another in one graph, for a compiler: (B, ...) -> (M, B, ...).

    Args:
        forward: Gives the architecture and the members' weights, which are not copied.
    """

    def __init__(self, forward: EnsembleForward) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for index in range(len(forward.members.names)):
            member = copy.deepcopy(forward.model)
            member.load_state_dict(forward.member_state(index), assign=True, strict=False)
            self.members.append(member.eval().requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        """Run every member on the same batch."""
        return torch.stack([member(x) for member in self.members])


def compile_archive(handler: type[Any], request: ArchiveRequest, stage: Path, step: Step) -> list[Package]:
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
    forward, examples = _load(handler(), stage)
    batch = _batch_size(request)
    (stage / COMPILED_FOLDER).mkdir()
    with torch.no_grad():
        module = Unrolled(forward).eval()
        packages = []
        for smallest, largest in [(1, 1), *([(2, batch)] if batch > 1 else [])]:
            step(f"compile for batches of {smallest} to {largest}")
            packages.append(_compile(module, examples, smallest, largest, stage))
    write_compiled(stage, target_here(forward.members, examples.shape[1:]), packages)
    return packages


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


def _load(handler: Any, stage: Path) -> tuple[EnsembleForward, Tensor]:
    """The forward as the handler makes it, and two examples (2, ...)."""
    handler.open(stage, load_settings(stage, handler.settings_class))
    forward = handler.load_forward()
    args = handler.collate(handler.sample_examples(2))
    with torch.no_grad():
        output = forward.member(0, *args) if type(forward) is EnsembleForward else None
    if not isinstance(output, Tensor) or len(args) != 1:
        raise ArchiveError(
            "--compile: expected a model in floating point that takes one tensor and gives one, as image "
            f"classifiers do; {type(handler).__name__} serves another, which can't be compiled ahead of time"
        )
    return forward, args[0]


def _batch_size(request: ArchiveRequest) -> int:
    if request.model_config is None:
        return 1
    config = yaml.safe_load(request.model_config.read_text(encoding="utf-8")) or {}
    return max(1, int(config.get("batchSize") or 1))


def _compile(module: nn.Module, examples: Tensor, smallest: int, largest: int, stage: Path) -> Package:
    file = f"{COMPILED_FOLDER}/batch-{smallest}-{largest}.pt2"
    dynamic = ({0: torch.export.Dim("batch", min=smallest, max=largest)},) if smallest < largest else None
    with _quiet_compiler():
        try:
            program = torch.export.export(module, (examples[:smallest].clone(),), dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(stage / file), inductor_configs=inductor_options()
            )
        except Exception as error:
            # Whatever a compiler may raise; its text names the operator or the line.
            line = (str(error).strip().splitlines() or ["no message"])[0]
            raise ArchiveError(f"--compile: {type(error).__name__}: {line}") from error
    path = stage / file
    return Package(file, smallest, largest, hash_file(path), path.stat().st_size)


def inductor_options() -> dict[str, Any]:
    """Freezing folds batch norm and packs weights for oneDNN; threads are the worker's, not this machine's."""
    return {"freezing": True, "cpp.dynamic_threads": True}


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """A cache of its own, which is removed, and none of the compiler's warnings."""
    from torch._inductor.utils import fresh_cache

    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), fresh_cache():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
