"""Turns the staged files of an archive into one ONNX graph of all members, beside them: onnx/members.onnx.

The members are loaded as a worker does; what exports them is vmap_ensemble.execution.onnx.graph.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from archiver.packing.staged import open_task
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.errors import ArchiveError, LoadError
from vmap_ensemble.execution.onnx.graph import export_members, reasons_against
from vmap_ensemble.execution.onnx.mode import EXPORTERS
from vmap_ensemble.execution.onnx.packages import write_onnx
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.tasks.task import Task


def check_exporter() -> None:
    """Refuse to begin without the packages that export.

    Raises:
        ArchiveError: One is missing.
    """
    missing = [name for name in EXPORTERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ArchiveError(f"--onnx: needs {' and '.join(missing)}: pip install 'vmap-ensemble[onnx]'")


def pack_graph(handler: type[Task], stage: Path) -> None:
    """Export staged members and write onnx/.

    Args:
        handler: The handler's class.
        stage: The archive's root, complete.

    Raises:
        ArchiveError: The members can't be exported.
    """
    task = open_task(handler, stage)
    if getattr(task.settings, "quantization", None):
        raise ArchiveError("--onnx: 8-bit members run in a way of their own; leave --onnx or 'quantization' away")
    forward = task.make_forward(Phases())
    reasons = reasons_against(forward)
    if reasons or not isinstance(forward, EnsembleForward):
        raise ArchiveError(f"--onnx: {'; '.join(reasons)}")
    try:
        write_onnx(export_members(forward, task.collate(task.sample_examples(2))), forward.members, stage)
    except LoadError as error:
        raise ArchiveError(f"--onnx: {error}") from error
