"""Turns a handler file into what archiving needs of it: its settings and default architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmap_ensemble.archive.settings import WORKER_KEYS, check_keys, known_keys, parse_settings
from vmap_ensemble.errors import ArchiveError, LoadError
from vmap_ensemble.tasks.register import import_file, task_in
from vmap_ensemble.tasks.task import Task


def load_handler(path: Path) -> type[Task]:
    """Import a handler file and return its class.

    Raises:
        ArchiveError: Importing fails, or the file doesn't define exactly one class that is a task.
    """
    try:
        return task_in(import_file(path), path.name)
    except LoadError as error:
        raise ArchiveError(str(error)) from error


def architecture_of(handler: type[Task], settings: Mapping[str, Any], where: str) -> str:
    """The architecture that a handler builds with these settings; text tasks make it from their mode."""
    return handler.architecture_of(parse_settings(settings, handler.settings_class, where))


def check_block(block: Mapping[str, Any], handler: type[Task], where: str) -> None:
    """Check a block as the worker will, so that a wrong key is found here and not at load.

    Raises:
        SettingsError: Names the key, what was expected and what was got.
    """
    kind = handler.settings_class
    check_keys(block, [key for key in known_keys(kind) if key not in WORKER_KEYS], where)
    parse_settings(block, kind, where)
