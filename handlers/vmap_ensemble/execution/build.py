"""Turns a forward and a mode into the callable that serves, proved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.execution import modes
from vmap_ensemble.execution.auto import Auto
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.execution.modes import MODES, Execution, ExecutionOptions, prove
from vmap_ensemble.execution.timing import Args


def build_execution(
    mode: str,
    forward: EnsembleForward,
    examples: Sequence[Args],
    options: ExecutionOptions | None = None,
) -> Execution:
    """Make the forward ready to serve in a mode.

    Args:
        mode: One of `MODES`.
        forward: The vmapped forward; its loop is the reference.
        examples: Argument tuples of the sizes that will be served, at least one; the first one is what a
            preparation is made for.
        options: See `ExecutionOptions`.

    Returns:
        The callable with its name, reason and candidates.

    Raises:
        SettingsError: The mode is unknown.
        LoadError: The mode was asked for and can't be had, or no example is given. Under `auto` a candidate
            that can't be had is logged and listed with its reason instead.
    """
    options = options or ExecutionOptions()
    if mode not in MODES:
        raise SettingsError(f"execution: expected one of {', '.join(MODES)}, got '{mode}'")
    if not examples:
        raise LoadError("execution: expected at least one example to run the forward on, got none")
    with torch.inference_mode():
        if mode == "auto":
            return Auto(forward, list(examples), options).choose()
        candidate = Candidate(mode)
        execution = Execution(mode, "asked for", [candidate], modes.build_mode(mode, forward, examples, options))
        prove(execution, forward, options.sample or examples[0], options.tolerance)
        candidate.difference = execution.proof.largest_difference if execution.proof else None
    return execution
