"""Turns work into a bar with an estimate on a terminal; in a log a line per epoch stands instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from optimise.distil.train import Training


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr, gone when they are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # In a log a bar would be empty lines.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def train(tool: str, training: Training, progress: Progress) -> None:
    """Run a training to its end, and tell of each epoch.

    Args:
        tool: Begins the lines of a log.
        training: Goes on where it was.
        progress: Gets a bar of all steps.
    """
    total, done = training.recipe.epochs * training.steps, training.epoch * training.steps
    bar = progress.add_task("train", total=total, completed=done)

    def told(epoch: int, held_out: float) -> None:
        progress.update(bar, description=f"train: epoch {epoch}, held-out loss {held_out:.4f}")
        if progress.disable:
            print(f"{tool}: epoch {epoch}, held-out loss {held_out:.4f}", file=sys.stderr)

    training.run(lambda: progress.update(bar, advance=1), told)
    progress.remove_task(bar)
