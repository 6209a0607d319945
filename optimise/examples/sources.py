"""Turns the options of a command into what an ensemble said of its data: to learn from, to stop by, to judge by."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from optimise.errors import OptimiseError
from optimise.examples.data import Classes, Columns, Data, open_data
from optimise.examples.idx import TEST, TRAIN, holds_idx
from optimise.examples.teacher import Teacher, Told, ask

LEAST_EXAMPLES = 20


@dataclass(frozen=True)
class Sources:
    """What is read: to learn from, to be judged by, and what is unlike both."""

    learn: Data
    test: Data | None
    unlike: Data | None


@dataclass(frozen=True)
class Parts:
    """What the ensemble said of each part."""

    learn: Told
    held_out: Told
    test: Told
    unlike: Told | None
    skipped: int


def open_sources(options: argparse.Namespace, teacher: Teacher) -> Sources:
    """All inputs, checked as a whole before anything is written."""
    task = teacher.task
    if getattr(teacher.settings, "quantization", None):
        raise OptimiseError(f"'{teacher.settings.name}': is quantised; take the archive without 'quantization'")
    classes = Classes(teacher.classes, task.labels)
    keys = task.item_keys or () if task.reads_texts else ()
    columns = Columns(options.column, options.label_column, not options.unlabelled, task.reads_texts, keys)
    learn = open_data(options.data, classes, columns)
    place = options.test or (options.data if holds_idx(options.data, TEST) else None)
    test = open_data(place, classes, columns, _part(place)) if place is not None else None
    strange = None
    if options.unlike is not None:
        unlabelled = dataclasses.replace(columns, label=None, is_labelled=False)
        strange = open_data(options.unlike, classes, unlabelled, _part(options.unlike))
    return Sources(learn, test, strange)


def _part(place: Path) -> str:
    return TEST if holds_idx(place, TEST) else TRAIN


def facts_of(options: argparse.Namespace, teacher: Teacher, sources: Sources) -> dict[str, Any]:
    """What of archive and data decides on what is made of them; what makes a run faster or slower doesn't."""
    paths = {"data": options.data, "test": options.test, "unlike": options.unlike}
    return {
        "archive": [member.sha256 for member in teacher.forward.members.members],
        "held_out": options.held_out,
        "unlabelled": options.unlabelled,
        **{key: str(path.absolute()) if path else None for key, path in paths.items()},
        "columns": [options.column, options.label_column],
        "rows": [data.count if data else None for data in (sources.learn, sources.test, sources.unlike)],
    }


def ask_all(
    tool: str,
    options: argparse.Namespace,
    teacher: Teacher,
    sources: Sources,
    work: Path,
    progress: Progress,
    *,
    learns: bool = True,
) -> Parts:
    """Ask the ensemble about everything, once however often a run goes on.

    Args:
        tool: Begins the lines on rows that are skipped.
        options: Of the command.
        teacher: What is asked.
        sources: What about.
        work: Where it is kept.
        progress: Gets a bar per part.
        learns: Whether something is trained; else all examples are there to judge by.

    Raises:
        OptimiseError: Too few examples can be read.
    """

    def one(data: Data | None, name: str) -> Told | None:
        if data is None:
            return None
        bar = progress.add_task(f"ask the ensemble: {name}", total=data.count)
        told = ask(teacher, data, work / name, options.workers, lambda count: progress.update(bar, advance=count))
        progress.remove_task(bar)
        _tell_skipped(f"{tool}: {name}", told, progress.console)
        return told

    told, test, unlike = one(sources.learn, "learn"), one(sources.test, "test"), one(sources.unlike, "unlike")
    if told is None or len(told) < LEAST_EXAMPLES:
        raise OptimiseError(
            f"{options.data}: {len(told or ())} examples can be read; expected at least {LEAST_EXAMPLES}"
        )
    skipped = sum(part.skipped[1] for part in (told, test, unlike) if part is not None)
    if not learns:
        return Parts(told, told, told if test is None else test, unlike, skipped)
    return _split(told, test, unlike, options, skipped)


def _split(told: Told, test: Told | None, unlike: Told | None, options: argparse.Namespace, skipped: int) -> Parts:
    generator = torch.Generator().manual_seed(options.seed)
    order, count = torch.randperm(len(told), generator=generator), max(2, int(options.held_out * len(told)))
    held_out, rest = told.part(order[:count].sort().values), order[count:]
    if test is None:
        test, rest = told.part(rest[:count].sort().values), rest[count:]
    return Parts(told.part(rest.sort().values), held_out, test, unlike, skipped)


def _tell_skipped(where: str, told: Told, console: Console) -> None:
    rows, count = told.skipped
    for row in rows:
        console.print(f"{where}: {row}; skipped", markup=False, highlight=False)
    if count:
        console.print(f"{where}: {count} of {count + len(told)} rows were skipped", markup=False)
