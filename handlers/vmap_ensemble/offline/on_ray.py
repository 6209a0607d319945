"""Turns rows into lines on a Ray cluster: each process there holds an ensemble, and answers windows of its own.

Windows are those of one machine, so the lines are, too: which examples share a batch depends on the window alone.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import EnsembleError, first_line
from vmap_ensemble.many import Row, Window, Windows
from vmap_ensemble.offline.inputs import Rows, open_rows
from vmap_ensemble.offline.run import answer_lines
from vmap_ensemble.tasks.answers import Options

# Tasks that Ray keeps books of, at most; each answers some windows.
MOST_BLOCKS = 1000


class OnRayError(EnsembleError):
    """Ray isn't installed, or its cluster failed: one line that says why."""


@dataclass(frozen=True)
class Job:
    """What each process is told.

    Attributes:
        archive: Where every node finds it, as `input`.
        input: Folder, table or shards.
        column: Of a table.
        options: Of all rows.
        batch: Examples in a forward, at most.
        device: One of its own for each process, if that is a GPU.
        loading: Further arguments of `Ensemble.load`.
    """

    archive: str
    input: Path
    column: str | None
    options: Options
    batch: int
    device: str | None
    loading: Mapping[str, Any]


class Answering:
    """One process: an ensemble, and the rows as far as they are read.

    Args:
        job: What it answers.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ensemble = Ensemble.load(job.archive, device=job.device, **job.loading)
        task = self._ensemble.task
        self._windows = Windows(task, open_rows(job.input, task.reads_texts, task.item_keys or (), job.column))
        self._begin()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """The lines of some windows.

        Args:
            batch: `window` -> their numbers.

        Returns:
            `lines` -> one text per window; JSON has no line ends of its own.
        """
        windows = [self._read(int(number)) for number in batch["window"]]
        answered = [answer_lines(self._ensemble, window, self._job.options, self._job.batch) for window in windows]
        return {"lines": ["\n".join(lines) for lines in answered]}

    def _begin(self) -> None:
        self._rows: Iterator[Row] = iter(self._windows.rows)
        self._next = 0

    def _read(self, number: int) -> Window:
        """A window; rows of those between are passed over unopened."""
        if number < self._next:  # of a process that has ended
            self._begin()
        size = self._windows.size
        for _ in islice(self._rows, (number - self._next) * size):
            pass
        self._next = number + 1
        return self._windows.parse(list(islice(self._rows, size)))


def check_ray() -> None:
    """Look whether Ray's data sets are installed, before minutes of other work.

    Raises:
        OnRayError: They aren't; one line that says how to.
    """
    try:
        importlib.import_module("ray.data")
    except ImportError:
        raise OnRayError("--on ray: needs Ray; pip install 'vmap-ensemble[ray]'") from None


def answer_on_ray(job: Job, rows: Rows, first: int, size: int) -> Iterator[list[str]]:
    """The lines of each window from `first` on, in order, by as many processes as the cluster has CPUs or GPUs for.

    Args:
        job: What each process is told; `threads` of its loading are CPUs of the cluster.
        rows: What `job.input` holds.
        first: Windows before it are left out.
        size: Rows in a window.

    Raises:
        OnRayError: The cluster can't do it.
    """
    import ray
    from ray.exceptions import RayError

    count = rows.count if rows.count is not None else sum(1 for _ in rows)
    numbers = range(first, -(-count // size))
    if not numbers:
        return
    # The cluster of RAY_ADDRESS, or one of its own on this machine.
    ray.init(ignore_reinit_error=True, logging_level=logging.WARNING, log_to_driver=False)
    try:
        for row in _dataset(job, numbers).iter_rows():
            yield row["lines"].split("\n")
    except RayError as error:
        raise OnRayError(f"--on ray: {first_line(error)}") from error


def _dataset(job: Job, numbers: range) -> Any:
    """The lines of windows as a Ray dataset, in the order of the windows."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of each run, and of the bars that it hasn't
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    on_gpu = (job.device or "cpu").startswith("cuda")
    cpus = job.loading["threads"]
    at_hand = ray.cluster_resources()
    most = at_hand.get("GPU", 0) if on_gpu else at_hand.get("CPU", 1) // cpus
    windows = ray.data.from_items(
        [{"window": number} for number in numbers], override_num_blocks=min(len(numbers), MOST_BLOCKS)
    )
    return windows.map_batches(
        Answering,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        num_cpus=cpus,
        num_gpus=1 if on_gpu else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(most))),
    )
