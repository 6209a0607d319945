"""N checkpoints of one architecture, one forward, one answer with an honest uncertainty."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vmap_ensemble.version import __version__

# Public name -> its module, imported when it is asked for: `import vmap_ensemble` doesn't import torch.
_PUBLIC = {
    "Answer": "vmap_ensemble.tasks.answers",
    "Ensemble": "vmap_ensemble.ensemble",
    "EnsembleError": "vmap_ensemble.errors",
    "ItemError": "vmap_ensemble.errors",
    "RequestError": "vmap_ensemble.errors",
    "Task": "vmap_ensemble.tasks.task",
    "combine_classes": "vmap_ensemble.core.aggregate",
    "stack_members": "vmap_ensemble.core.members",
}
__all__ = [
    "Answer",
    "Ensemble",
    "EnsembleError",
    "ItemError",
    "RequestError",
    "Task",
    "__version__",
    "combine_classes",
    "stack_members",
]

if TYPE_CHECKING:
    from vmap_ensemble.core.aggregate import combine_classes
    from vmap_ensemble.core.members import stack_members
    from vmap_ensemble.ensemble import Ensemble
    from vmap_ensemble.errors import EnsembleError, ItemError, RequestError
    from vmap_ensemble.tasks.answers import Answer
    from vmap_ensemble.tasks.task import Task


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
