"""Registers the mode `prepared`: weights packed once at load for a CPU, or the preparation that a forward brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.kernel_library import library_name
from vmap_ensemble.execution.cpu.networks import build_prepared, growth
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args


def kernels_of(forward: Forward) -> str | None:
    """The library of our own kernels that would serve; None where it can't."""
    # Asked for where they serve alone: the answer may take a compiler, and a warning that there is none.
    plain = forward.one_vmap
    serves = forward.preparation is not None or (plain is not None and plain.has_convolutions)
    return library_name() if serves and forward.members.device.type == "cpu" else None


def reasons_against(forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> list[str]:
    """What is known before the model is traced."""
    if forward.preparation is None and forward.one_vmap is None:
        return [f"{type(forward).__name__} is more than one call of vmap, and brings no preparation of its own"]
    return []


@mode("prepared", what="the prepared forward", place=0, reasons_against=reasons_against, library=kernels_of)
def build(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """The forward's own preparation, or that of convolutional networks."""
    plain = forward.one_vmap
    if forward.preparation is not None:
        return Built(forward.preparation(examples[0]))
    if plain is None:
        raise LoadError(f"execution 'prepared': {'; '.join(reasons_against(forward, examples, options))}")
    schedule = None if options.schedule is None else Schedule(**options.schedule)
    budget, count = options.budget, options.count
    run = build_prepared(plain.model, plain.members, examples, schedule=schedule, budget=budget, count=count)
    longer = growth(run.schedule, len(plain.members.names), count)
    return Built(run, run.channels_last, dataclasses.asdict(run.schedule), longer)
