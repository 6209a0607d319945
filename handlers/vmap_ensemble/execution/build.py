"""Turns a forward and the name of a mode into the callable that serves, proved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vmap_ensemble.archive.modes import AUTO, reason_against_name
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.execution import modes
from vmap_ensemble.execution.auto import Auto
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.execution.modes import Execution, ExecutionOptions, prove
from vmap_ensemble.execution.register import Built
from vmap_ensemble.execution.timing import Args
from vmap_ensemble.process.device import set_float32_precision


def build_execution(
    mode: str,
    forward: Forward,
    examples: Sequence[Args],
    options: ExecutionOptions | None = None,
) -> Execution:
    """Make the forward ready to serve in a mode.

    Args:
        mode: `auto`, or the name of a registered mode (`register.mode`). A forward that can be run in one way alone
            (`only_mode`) is run in that way.
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

    Note:
        With members on a GPU the precision of float32 is set for the process; see `ExecutionOptions`.
    """
    options = options or ExecutionOptions()
    unknown = reason_against_name(mode)
    if unknown:
        raise SettingsError(f"execution: {unknown}")
    if not examples:
        raise LoadError("execution: expected at least one example to run the forward on, got none")
    if forward.members.device.type == "cuda" and options.float32_matmul_precision is not None:
        set_float32_precision(options.float32_matmul_precision)
    with torch.inference_mode():
        if forward.only_mode is not None:
            name, built, reason = forward.only_mode, Built(forward, forward.channels_last), f": {forward.reason}"
        elif mode == AUTO:
            return Auto(forward, list(examples), options).choose()
        else:
            name, built, reason = mode, modes.build_mode(mode, forward, examples, options), ""
        candidate = Candidate(name)
        execution = Execution(
            name,
            f"asked for{reason}",
            [candidate],
            built.run,
            channels_last=built.channels_last,
            schedule=built.schedule,
        )
        prove(execution, forward, options.sample or examples[0], options.tolerance)
        candidate.difference = execution.proof.largest_difference if execution.proof else None
    return execution
