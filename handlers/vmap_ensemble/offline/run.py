"""Turns rows and an archive, on one device or several, into windows of lines in the rows' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.many import Window, answer_window
from vmap_ensemble.offline.output import line_of
from vmap_ensemble.tasks.answers import Options

# Windows that wait for each device beside the one that it works on.
AHEAD = 1


def answer_windows(
    ensembles: Sequence[Ensemble], windows: Iterator[Window], options: Options, batch: int
) -> Iterator[list[str]]:
    """The lines of each window, in order; each device gets every n-th window.

    Args:
        ensembles: The same archive on each device.
        windows: Parsed rows.
        options: Of all rows.
        batch: Examples in a forward, at most.
    """
    if len(ensembles) == 1:
        for window in windows:
            yield answer_lines(ensembles[0], window, options, batch)
        return
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1, "device")) for _ in ensembles]
        waiting: deque[Future[list[str]]] = deque()
        for number, window in enumerate(windows):
            turn = number % len(ensembles)
            waiting.append(pools[turn].submit(answer_lines, ensembles[turn], window, options, batch))
            if len(waiting) >= len(ensembles) * (1 + AHEAD):
                yield waiting.popleft().result()
        for lines in waiting:
            yield lines.result()


def answer_lines(ensemble: Ensemble, window: Window, options: Options, batch: int) -> list[str]:
    """The lines of one window.

    Args:
        ensemble: What is asked.
        window: Parsed rows.
        options: Of all rows.
        batch: Examples in a forward, at most.
    """
    answers = answer_window(ensemble, window.examples, options, batch)
    return [line_of(name, answer) for name, answer in zip(window.names, answers, strict=True)]
