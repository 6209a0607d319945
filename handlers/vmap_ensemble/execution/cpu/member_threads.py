"""Turns one job per member into results, with the members spread over the machine's cores.

Layers of one image are too small to split well: two members on a core each are faster than one member on
two cores, twice. PyTorch releases the interpreter's lock inside its operators, so threads are enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class MemberThreads:
    """Runs jobs on `groups` threads, each of which computes with its share of the cores.

    Args:
        groups: Jobs at a time; 1 runs them here, one after another, each on all cores.
    """

    def __init__(self, groups: int) -> None:
        if groups < 1:
            raise ValueError(f"groups is {groups}; expected 1 or more")
        self.groups = groups
        self._pool: ThreadPoolExecutor | None = None
        if groups > 1:
            self._start_pool(max(1, torch.get_num_threads() // groups))

    def _start_pool(self, threads_each: int) -> None:
        before = torch.get_num_threads()
        started = threading.Barrier(self.groups)

        def start() -> None:
            # A thread's first look at the number resets it to the process's, so that look comes first.
            torch.get_num_threads()
            torch.set_num_threads(threads_each)
            started.wait(timeout=60)  # so that each thread takes exactly one of the first jobs

        self._pool = ThreadPoolExecutor(self.groups, thread_name_prefix="member")
        for future in [self._pool.submit(start) for _ in range(self.groups)]:
            future.result()
        # set_num_threads is per thread for OpenMP but for the process in MKL and for threads yet to start.
        torch.set_num_threads(before)

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """The function's results, in the order of the jobs; a single job runs here, on all cores."""
        if self._pool is None or len(jobs) < 2:
            return [function(job) for job in jobs]
        results: list[Result] = [None] * len(jobs)  # type: ignore[list-item]
        queue = iter(enumerate(jobs))  # one step of it is atomic: whoever is free takes the next member

        def work() -> None:
            with torch.no_grad():
                for index, job in queue:
                    results[index] = function(job)

        for future in [self._pool.submit(work) for _ in range(min(self.groups, len(jobs)))]:
            future.result()
        return results

    def call(self, function: Callable[[], Result]) -> Result:
        """The function's result, worked out on one of the threads, or here if there are none."""
        return function() if self._pool is None else self._pool.submit(function).result()

    def close(self) -> None:
        """End the threads; the object isn't used afterwards."""
        if self._pool is not None:
            self._pool.shutdown()
