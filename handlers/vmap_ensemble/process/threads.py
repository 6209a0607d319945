"""Turns the cores that this process may use and the number of workers into torch's number of threads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def cores_at_hand(cgroup_limit: Path = CGROUP_LIMIT) -> int:
    """Cores that this process may use: the scheduler's mask, or the container's quota where that is less."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores


def threads_per_worker(model_config: Mapping[str, Any] | None, cores: int) -> int:
    """Share the cores among the workers of a model, so that they don't oversubscribe them.

    Args:
        model_config: The model-config yaml as TorchServe hands it over; its maxWorkers or minWorkers count.
        cores: Cores at hand.
    """
    config = model_config or {}
    workers = config.get("maxWorkers") or config.get("minWorkers") or 1
    return max(1, cores // max(1, int(workers)))
