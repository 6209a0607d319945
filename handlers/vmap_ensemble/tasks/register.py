"""Turns the handler file that an archive names into its task: ours by name, one of somebody's own by its class."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.tasks.task import Task

# Handler file -> `module:class`, imported when asked for: transformers takes seconds.
TASKS: dict[str, str] = {
    "mnist_handler.py": "vmap_ensemble.tasks.images.mnist:MnistTask",
    "resnet_handler.py": "vmap_ensemble.tasks.images.torchvision:TorchvisionTask",
    "bert_handler.py": "vmap_ensemble.tasks.text.encoder_task:EncoderTask",
    "ft_bert_handler.py": "vmap_ensemble.tasks.text.traced_task:TracedTask",
}


def find_task(folder: Path, handler: str) -> type[Task]:
    """The task of an archive.

    Args:
        folder: The unpacked archive, which holds the handler file if it is somebody's own.
        handler: The file's name, as setup_config.json has it; empty for tensors with labels.

    Raises:
        LoadError: There is no such file, or it doesn't define exactly one task.
    """
    if not handler:
        return Task
    if handler in TASKS:
        module, _, name = TASKS[handler].partition(":")
        task: type[Task] = getattr(importlib.import_module(module), name)
        return task
    return task_in(import_file(folder / handler), handler)


def task_in(module: ModuleType, file: str) -> type[Task]:
    """The one task that a handler module defines itself; imported classes don't count (TorchServe's rule, too).

    Raises:
        LoadError: It defines none or several, or a class that is no task.
    """
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    if len(own) != 1:
        names = ", ".join(kind.__name__ for kind in own) or "none"
        raise LoadError(f"{file}: TorchServe wants exactly one class in a handler file, got {names}")
    if not issubclass(own[0], Task):
        raise LoadError(f"{file}: {own[0].__name__} must extend VmapEnsembleHandler or a task of vmap_ensemble.tasks")
    return own[0]


def import_file(path: Path) -> ModuleType:
    """Import a handler file; its neighbours are found while it is imported.

    Raises:
        LoadError: It can't be imported.
    """
    spec = importlib.util.spec_from_file_location(f"handler_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LoadError(f"{path.name}: no such handler file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any error at all may come out of a user's own file
        raise LoadError(f"{path.name}: importing it fails ({type(error).__name__}: {first_line(error)})") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
