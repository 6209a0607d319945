"""Names what distillation refuses."""

from __future__ import annotations

from vmap_ensemble.errors import EnsembleError


class DistilError(EnsembleError):
    """An archive, its data or the output can't be used as asked: one line that says why."""


class GateError(DistilError):
    """The student loses more than is allowed."""
