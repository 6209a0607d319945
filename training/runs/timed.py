"""Turns the options of a command that trains members of texts into them, and errors into a line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from vmap_ensemble.errors import EnsembleError


def run_training(options: argparse.Namespace, train: Callable[[range], Any]) -> int:
    """Train a member per seed and say how long it took; returns the exit code, 1 with a line where it is refused.

    Args:
        options: Threads, the first seed and the number of members.
        train: Called with the seeds.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    seeds = range(options.seed, options.seed + options.num_models)
    try:
        train(seeds)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"trained {len(seeds)} members in {time.perf_counter() - start:.0f} s")
    return 0
