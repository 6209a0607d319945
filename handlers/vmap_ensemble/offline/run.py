"""Turns rows and an archive, on one device or several, into windows of answers in the rows' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError
from vmap_ensemble.many import Window, answer_window
from vmap_ensemble.tasks.answers import Answer, Options

Answered = tuple[list[str], list[Answer | ItemError]]
# Windows that wait for each device beside the one that it works on.
AHEAD = 1


def answer_windows(
    ensembles: Sequence[Ensemble], windows: Iterator[Window], options: Options, batch: int
) -> Iterator[Answered]:
    """Names and answers of each window, in order; each device gets every n-th window.

    Args:
        ensembles: The same archive on each device.
        windows: Parsed rows.
        options: Of all rows.
        batch: Examples in a forward, at most.
    """
    if len(ensembles) == 1:
        for names, examples in windows:
            yield names, answer_window(ensembles[0], examples, options, batch)
        return
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1, "device")) for _ in ensembles]
        waiting: deque[tuple[list[str], Future[list[Answer | ItemError]]]] = deque()
        for number, (names, examples) in enumerate(windows):
            turn = number % len(ensembles)
            waiting.append((names, pools[turn].submit(answer_window, ensembles[turn], examples, options, batch)))
            if len(waiting) >= len(ensembles) * (1 + AHEAD):
                names, found = waiting.popleft()
                yield names, found.result()
        for names, found in waiting:
            yield names, found.result()
