"""Turns an archive into an ensemble that a long-lived server asks, and asks it whether it still answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.process.memory import freed_memory_returned, keep_freed_memory


def load_served(archive: str, batch_size: int, cores: int, settings: Mapping[str, Any]) -> Ensemble:
    """Load and prove an archive for a process that serves it.

    Args:
        archive: A .mar, or the folder that one was unpacked into.
        batch_size: Requests in a batch, at most: `auto` measures with it.
        cores: Torch's threads, unless `settings` say how many.
        settings: Instead of the archive's own, as in setup_config.json.

    Raises:
        EnsembleError: It can't be loaded; one line that says why.
    """
    keep_freed_memory()
    threads = settings.get("threads")
    with freed_memory_returned():
        return Ensemble.load(
            archive,
            threads=threads if isinstance(threads, int) else cores,
            batch_sizes=[batch_size],
            settings=settings,
        )


def ask_sample(ensemble: Ensemble) -> None:
    """Ask all members about the task's sample input: what is raised says why no request would be answered."""
    ensemble.outputs(*ensemble.task.collate(ensemble.task.sample_examples(1)))
