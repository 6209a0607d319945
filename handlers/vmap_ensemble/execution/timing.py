"""Turns a callable and its arguments into the seconds that a call takes, as a server makes them.

Whatever is measured at load is measured by these functions: candidates of `auto`, orders of members, rows for BLAS.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.chunking import is_out_of_memory

Run = Callable[..., Any]
Args = tuple[Any, ...]
PAUSE_S = 0.02
BLOCK_S = 0.02  # of counted calls in a block, at least one
MOST_CALLS = 50
# From here on a call outweighs what ran before it: a block is one call, and none is thrown away.
LONG_S = 0.1
# So many times the time of what it would replace ends the measuring of a candidate: it won't serve.
HOPELESS = 1.5
# Ahead by so much in each of its readings, something is the fastest: more readings would only take time.
CLEAR = 1.3


class Budget:
    """Seconds that measuring may take, from now on.

    Args:
        seconds: How many.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._started = seconds, time.monotonic()

    def share(self, part: float, most_s: float) -> Budget:
        """A part of what is left, `most_s` seconds at most, as a budget that begins now."""
        return Budget(min(most_s, part * self.left_s))

    @property
    def left_s(self) -> float:
        """What is left; below 0 once it's overdrawn."""
        return self.seconds - (time.monotonic() - self._started)

    def rounds(self, most: int, least: int) -> Iterator[int]:
        """Numbers of rounds of readings: `least` in any case, up to `most` while something is left."""
        for round_ in range(most):
            if round_ >= least and self.left_s <= 0:
                return
            yield round_


def time_call(run: Run, args: Args) -> tuple[Any, float]:
    """What the run gives, and the seconds that it takes.

    Raises:
        LoadError: There is not enough memory for it.
    """
    _wait_for(args)
    started = time.perf_counter()
    try:
        outputs = run(*args)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise LoadError(f"ran out of memory on a batch: {first_line(error)}") from error
        raise
    _wait_for(outputs)
    return outputs, time.perf_counter() - started


def _wait_for(tensors: Any) -> None:
    """Let the GPU finish what these are made of; arguments may be on the host while outputs aren't."""
    for leaf in pytree.tree_leaves(tensors):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            torch.cuda.synchronize(leaf.device)
            return


def time_block(run: Run, args: Args, about_s: float) -> float:
    """Seconds of a call: the median of a block, after a pause and a call that isn't counted.

    Args:
        run: What is measured.
        args: Its arguments.
        about_s: What a call is known to take, about; long calls are measured once.
    """
    if about_s >= LONG_S:
        return time_call(run, args)[1]
    time.sleep(PAUSE_S)
    first_s = time_call(run, args)[1]
    calls = min(MOST_CALLS, max(1, round(BLOCK_S / max(first_s, 1e-6))))
    return statistics.median(time_call(run, args)[1] for _ in range(calls))
