"""Names what the tools of this package refuse."""

from __future__ import annotations

from vmap_ensemble.errors import EnsembleError


class OptimiseError(EnsembleError):
    """An archive, its data or the output can't be used as asked: one line that says why."""


class GateError(OptimiseError):
    """What was made loses more than is allowed."""
