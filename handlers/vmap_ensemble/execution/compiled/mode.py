"""Registers the mode `compiled`: the archive's native code, or else the forward compiled at load."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.execution.compiled.native_code import compile_here, reasons_against
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args, Run

# A compilation can't be interrupted, so `auto` starts one only if this much of its budget is left.
COMPILE_NEEDS_S = 60.0


def seconds_needed(options: ExecutionOptions) -> float:
    """None where the archive brings native code, which is only loaded."""
    return COMPILE_NEEDS_S if options.packed is None else 0.0


@mode("compiled", what="the compiled forward", place=2, needs_s=seconds_needed)
def build(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """The archive's native code; else vmap's forward compiled, or members unrolled where that is slow."""
    if options.packed is not None:
        return Built(options.packed())
    plain = forward.one_vmap
    on_cpu = forward.members.device.type == "cpu"
    if on_cpu and plain is not None and plain.has_convolutions and not reasons_against(forward, examples[0]):
        return Built(compile_here(plain, [args[0] for args in examples]))
    unpacked = forward.without_packed_weights()
    run: Run = torch.compile(lambda *args: unpacked(*args))
    for args in examples:  # compiling happens at the first call of a size, which should be none of a request's
        run(*args)
    return Built(run)
