"""Turns TorchServe's configuration of a model into what a worker process of it does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any


def threads_per_worker(model_config: Mapping[str, Any] | None, cores: int) -> int:
    """Share the cores among the workers of a model, so that they don't oversubscribe them.

    Args:
        model_config: The model-config yaml as TorchServe hands it over; its maxWorkers or minWorkers count.
        cores: Cores at hand.
    """
    config = model_config or {}
    workers = config.get("maxWorkers") or config.get("minWorkers") or 1
    return max(1, cores // max(1, int(workers)))


def quieten_worker() -> None:
    """Drop the line that ts/protocol/otf_message_handler.py logs per batch: under load Java reads every one."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("vmap_ensemble", "ts.metrics"):  # metrics are log lines, too
        logging.getLogger(name).setLevel(logging.INFO)
