"""Turns a handler file into what archiving needs of it: its settings and default architecture."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from vmap_ensemble.archive.settings import WORKER_KEYS, check_keys, known_keys, parse_settings
from vmap_ensemble.errors import ArchiveError


def load_handler(path: Path) -> type[Any]:
    """Import a handler file and return its class.

    Raises:
        ArchiveError: Importing fails, or the file doesn't define exactly one class that extends
            VmapEnsembleHandler.
    """
    _silence_imports()
    from vmap_ensemble.frontends.torchserve.handler import (
        VmapEnsembleHandler,  # here: TorchServe's import takes seconds
    )

    module = _import(path)
    # TorchServe's rule (model_loader.py, list_classes_from_module): one class of the module itself.
    own = [value for value in vars(module).values() if _defined_in(value, module)]
    if len(own) != 1:
        names = ", ".join(cls.__name__ for cls in own) or "none"
        raise ArchiveError(f"{path.name}: TorchServe wants exactly one class in a handler file, got {names}")
    if not issubclass(own[0], VmapEnsembleHandler):
        raise ArchiveError(f"{path.name}: {own[0].__name__} must extend VmapEnsembleHandler")
    return own[0]


def _silence_imports() -> None:
    """TorchServe's base handler tries every accelerator at import and reports those that aren't there."""
    logging.getLogger("ts.torch_handler.base_handler").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"openvino\.")


def _defined_in(value: Any, module: ModuleType) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"archived_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ArchiveError(f"{path.name}: can't be imported")
    module = importlib.util.module_from_spec(spec)
    # A handler may import its neighbours, which come along as extra_files.
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Any error at all may come out of a user's own file.
        raise ArchiveError(f"{path.name}: importing it fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def architecture_of(handler: type[Any], settings: Mapping[str, Any], where: str) -> str:
    """The architecture that a handler builds with these settings; text handlers make it from their mode."""
    instance = handler()
    instance.settings = parse_settings(settings, handler.settings_class, where)
    return str(instance.architecture)


def check_block(block: Mapping[str, Any], handler: type[Any], where: str) -> None:
    """Check a block as the worker will, so that a wrong key is found here and not at load.

    Raises:
        SettingsError: Names the key, what was expected and what was got.
    """
    kind = handler.settings_class
    check_keys(block, [key for key in known_keys(kind) if key not in WORKER_KEYS], where)
    parse_settings(block, kind, where)
