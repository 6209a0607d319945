"""Turns the staged files of an archive into its task and forward, loaded as a worker loads them, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.archive.manifest import read_manifest
from vmap_ensemble.archive.settings import load_settings, override_settings
from vmap_ensemble.process.device import DTYPES
from vmap_ensemble.tasks.task import Place, Task


def open_task(kind: type[Task], stage: Path, **overrides: Any) -> Task:
    """The task of a staged archive.

    Args:
        kind: The handler's class.
        stage: The archive's root.
        overrides: Settings that replace the archive's: another precision, say.
    """
    settings = override_settings(load_settings(stage, kind.settings_class), overrides)
    place = Place(stage, read_manifest(stage), torch.device("cpu"), DTYPES[settings.dtype], torch.get_num_threads())
    return kind(settings, place)
