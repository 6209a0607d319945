"""Turns settings and an unpacked archive into what an ensemble starts with: its place, its run, its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.archive.manifest import Manifest, check_code, read_manifest
from vmap_ensemble.archive.modes import CHOICES_FOLDER
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.core.proof import Proof, find_row_dependence, prove_equal
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.compiled.packages import COMPILED_FILE, CompiledForward
from vmap_ensemble.execution.devices import build_on_devices
from vmap_ensemble.execution.modes import Execution
from vmap_ensemble.execution.onnx.packages import ONNX_FILE
from vmap_ensemble.execution.register import ExecutionOptions
from vmap_ensemble.process.cache import CACHE
from vmap_ensemble.process.device import choose_device, choose_dtype, set_float32_precision
from vmap_ensemble.tasks.task import Place, Task
from vmap_ensemble.version import __version__

SAMPLE_BATCH = 2


class ProvedAtFirst:
    """A forward that is proved on the first batch that it is called with."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.proof: Proof | None = None

    def __call__(self, *args: Any) -> Any:
        if self.proof is None:
            self.proof = prove_equal(self.forward, self.forward, args)
        return self.forward(*args)


def make_place(settings: Settings, folder: Path | None, threads: int, gpu_id: int | None) -> Place:
    """Where a task computes by its settings, and what it may read; float32's precision is set for the process."""
    set_float32_precision(settings.float32_matmul_precision)
    device = choose_device(settings.devices[0] if settings.devices else settings.device, gpu_id)
    manifest = read_manifest(folder) if folder else Manifest(())
    if folder:
        check_code(folder, manifest)
    return Place(folder, manifest, device, choose_dtype(settings.dtype, device), threads)


def choose_execution(task: Task, forward: Forward, batch_sizes: Sequence[int]) -> Execution:
    """Decide how an archive's forward is run, by its settings; a choice that was measured is kept for the next start.

    Args:
        task: Made for the unpacked archive.
        forward: Of its members.
        batch_sizes: Sizes that will be asked; batches of one are always measured.
    """
    settings, folder = task.settings, task.place.folder
    hashes = "".join(member.sha256 for member in forward.members.members)
    compiled, onnx = (_read(folder, name) for name in (COMPILED_FILE, ONNX_FILE))
    chosen_for = f"{__version__} {settings.dtype} {hashes}".encode() + compiled + onnx
    options = ExecutionOptions(
        budget_s=settings.execution_budget_s,
        tolerance=settings.tolerance,
        cache_dir=CACHE / "execution",
        packed_choices=folder / CHOICES_FOLDER if folder else None,
        archive_sha=hashlib.sha256(chosen_for).hexdigest(),
        sample=task.collate(task.sample_examples(SAMPLE_BATCH)),
        packed=(lambda: CompiledForward(folder, forward.members, task.input_shape)) if folder and compiled else None,
        graph_folder=folder if onnx else None,
        float32_matmul_precision=settings.float32_matmul_precision,
    )
    examples = [task.collate(task.sample_examples(size)) for size in sorted({1, *batch_sizes})]
    return run_where_asked(task, forward, examples, options)


def run_where_asked(
    task: Task, forward: Forward, examples: Sequence[tuple[Any, ...]], options: ExecutionOptions
) -> Execution:
    """Build a task's forward on its device, or on the several that its settings name."""
    settings = task.settings
    if settings.devices is None:
        return build_execution(settings.execution, forward, examples, options)

    def join(members: StackedMembers) -> Forward:
        return task.join(copy.deepcopy(forward.model), members)  # type: ignore[attr-defined]

    devices = [torch.device(name) for name in settings.devices]
    return build_on_devices(settings.execution, forward, join, devices, examples, options)


def find_packed(folder: Path | None) -> dict[str, bool]:
    """Which forwards an archive brings beside its members."""
    files = {"compiled": COMPILED_FILE, "onnx": ONNX_FILE}
    return {name: folder is not None and (folder / file).is_file() for name, file in files.items()}


def _read(folder: Path | None, name: str) -> bytes:
    """A file of an archive; empty where it brings none."""
    path = folder / name if folder else None
    return path.read_bytes() if path and path.is_file() else b""


@torch.inference_mode()
def depends_on_neighbours(task: Task, forward: Forward) -> float | None:
    """How far an example's answer depends on the others in its batch; None if it doesn't."""
    examples = task.sample_examples(SAMPLE_BATCH)
    rows = [task.collate([example]) for example in examples]
    return find_row_dependence(forward, task.collate(examples), rows, task.settings.tolerance)


def read_weights(settings: Settings, names: Sequence[str]) -> Tensor:
    """(M, 1) weights of the members, as the settings give them; equal where they give none.

    Raises:
        SettingsError: They are for other members, or all 0.
    """
    given = settings.weights
    if given is None:
        return torch.ones(len(names), 1)
    unknown, missing = sorted(set(given) - set(names)), sorted(set(names) - set(given))
    if unknown or missing or not any(given.values()):
        raise SettingsError(
            f"setup_config.json: weights: expected one for each of {', '.join(names)} and one above "
            f"0, got unknown {unknown}, missing {missing}"
        )
    return torch.tensor([[given[name]] for name in names])
