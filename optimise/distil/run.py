"""Turns the options of the command into a student: asked, trained, judged and written, in that order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optimise.distil.data import Classes, Data, open_data
from optimise.distil.errors import DistilError, GateError
from optimise.distil.idx import TEST, TRAIN, holds_idx
from optimise.distil.judge import judge, labels_to_judge_by, settings_of_student
from optimise.distil.report import Column, Limits, as_json, reason_against, rows_of
from optimise.distil.start import make_student
from optimise.distil.teacher import Teacher, Told, ask
from optimise.distil.train import Recipe, Training
from optimise.distil.work import REPORT, opened
from optimise.distil.write import write_block, write_json, write_members
from vmap_ensemble.archive.settings import SETTINGS_FILE, read_block
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.process.device import cpu_name

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


def run(options: argparse.Namespace) -> int:
    """Distil an archive; returns the command's exit code.

    Raises:
        EnsembleError: One line that says what is refused.
    """
    with unpacked(options.archive) as folder:
        given = {"device": options.device, "execution": options.execution, "threads": options.threads}
        teacher = Teacher(Ensemble.load(folder, batch_sizes=(1, 8, options.batch_size), **given))
        if options.to == "heads" and len(teacher.ensemble.names) < 2:
            raise DistilError(f"{options.archive.name}: has one member; heads need at least two")
        sources = _open(options, teacher)
        recipe = _recipe(options)
        student = make_student(teacher, folder, options.to, options.architecture, options.head, options.seed)
        made_with = _made_with(options, teacher, sources, recipe)
        with _progress() as progress, opened(options.output, made_with, options.anew) as work:
            parts = _ask(options, teacher, sources, work, progress)
        for old in (REPORT, SETTINGS_FILE):
            (options.output / old).unlink(missing_ok=True)
        with _progress() as progress:
            training = Training(
                student, options.to, teacher, parts.learn, parts.held_out, recipe, work / "training.pt"
            )
            _train(training, progress)
        return _finish(options, teacher, training, parts, folder)


# --- before ----------------------------------------------------------------------------------------------------


def _open(options: argparse.Namespace, teacher: Teacher) -> Sources:
    """All inputs, checked as a whole before anything is written."""
    classes = Classes(teacher.classes, teacher.task.labels)
    columns = (options.column, options.label_column, not options.unlabelled)
    learn = open_data(options.data, classes, *columns)
    place = options.test or (options.data if holds_idx(options.data, TEST) else None)
    part = TEST if place is not None and holds_idx(place, TEST) else TRAIN
    test = open_data(place, classes, *columns, part=part) if place is not None else None
    strange = None
    if options.unlike is not None:
        part = TEST if holds_idx(options.unlike, TEST) else TRAIN
        strange = open_data(options.unlike, classes, options.column, labelled=False, part=part)
    return Sources(learn, test, strange)


def _recipe(options: argparse.Namespace) -> Recipe:
    is_heads = options.to == "heads"
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        temperature=options.temperature,
        label_weight=options.label_weight if options.label_weight is not None else 0.0 if is_heads else 0.1,
        augment=options.augment or ("diverse" if is_heads else "plain"),
        patience=options.patience,
        seed=options.seed,
    )


def _made_with(options: argparse.Namespace, teacher: Teacher, sources: Sources, recipe: Recipe) -> dict[str, Any]:
    """What decides on the student; what makes the run faster or slower doesn't."""
    return {
        "archive": [member.sha256 for member in teacher.forward.members.members],
        "to": options.to,
        "architecture": options.architecture,
        "head": options.head,
        "held_out": options.held_out,
        "unlabelled": options.unlabelled,
        **{key: str(path.absolute()) if path else None for key, path in _paths(options).items()},
        "columns": [options.column, options.label_column],
        "rows": [data.count if data else None for data in (sources.learn, sources.test, sources.unlike)],
        "recipe": vars(recipe),
    }


def _paths(options: argparse.Namespace) -> dict[str, Path | None]:
    return {"data": options.data, "test": options.test, "unlike": options.unlike}


# --- the work ----------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # In a log a bar would be empty lines: a line per epoch stands there instead.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _ask(options: argparse.Namespace, teacher: Teacher, sources: Sources, work: Path, progress: Progress) -> Parts:
    def one(data: Data | None, name: str) -> Told | None:
        if data is None:
            return None
        bar = progress.add_task(f"ask the ensemble: {name}", total=data.count)
        told = ask(teacher, data, work / name, options.workers, lambda count: progress.update(bar, advance=count))
        progress.remove_task(bar)
        _tell_skipped(name, told, progress.console)
        return told

    told, test, unlike = one(sources.learn, "learn"), one(sources.test, "test"), one(sources.unlike, "unlike")
    skipped = sum(part.skipped[1] for part in (told, test, unlike) if part is not None)
    if told is None or len(told) < LEAST_EXAMPLES:
        raise DistilError(
            f"{options.data}: {len(told or ())} examples can be read; expected at least {LEAST_EXAMPLES}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    order, count = torch.randperm(len(told), generator=generator), max(2, int(options.held_out * len(told)))
    held_out, rest = told.part(order[:count].sort().values), order[count:]
    if test is None:
        test, rest = told.part(rest[:count].sort().values), rest[count:]
    return Parts(told.part(rest.sort().values), held_out, test, unlike, skipped)


def _tell_skipped(name: str, told: Told, console: Console) -> None:
    rows, count = told.skipped
    for row in rows:
        console.print(f"distil: {name}: {row}; skipped", markup=False, highlight=False)
    if count:
        console.print(f"distil: {name}: {count} of {count + len(told)} rows were skipped", markup=False)


def _train(training: Training, progress: Progress) -> None:
    total, done = training.recipe.epochs * training.steps, training.epoch * training.steps
    bar = progress.add_task("train", total=total, completed=done)

    def told(epoch: int, held_out: float) -> None:
        progress.update(bar, description=f"train: epoch {epoch}, held-out loss {held_out:.4f}")
        if progress.disable:
            print(f"distil: epoch {epoch}, held-out loss {held_out:.4f}", file=sys.stderr)

    training.run(lambda: progress.update(bar, advance=1), told)
    progress.remove_task(bar)


# --- after -------------------------------------------------------------------------------------------------------


def _finish(options: argparse.Namespace, teacher: Teacher, training: Training, parts: Parts, folder: Path) -> int:
    states = training.student.states()
    settings = settings_of_student(read_block(folder), teacher, options.architecture, options.to)
    columns = judge(teacher, training.student, settings, parts.test, parts.unlike)
    labels_are_real = labels_to_judge_by(parts.test)[1]
    files = write_members(options.output, states)
    _show(columns, labels_are_real)
    reason = reason_against(columns, Limits(options.max_accuracy_loss, options.max_nll_loss))
    told = {
        "accepted": reason is None,
        "reason": reason,
        **_facts(options, teacher, training, parts, labels_are_real),
    }
    write_json(options.output / REPORT, {**told, **as_json(columns), "history": training.history})
    if reason and not options.force:
        raise GateError(
            f"refused: {reason}. The members are in {options.output}, without the setup_config.json that packs "
            "them; --force writes it"
        )
    name = f"{teacher.settings.name}_{options.to}"
    block = write_block(options.output, folder, name, settings, files)
    print(f"pack it: ./archive.sh {name} --config {block}")
    return 0


def _facts(
    options: argparse.Namespace, teacher: Teacher, training: Training, parts: Parts, labels_are_real: bool
) -> dict[str, Any]:
    device = teacher.device
    return {
        "to": options.to,
        "recipe": vars(training.recipe),
        "examples": {"learn": len(parts.learn), "held_out": len(parts.held_out), "test": len(parts.test)},
        "skipped": parts.skipped,
        "labels": "given" if labels_are_real else "the ensemble's own",
        "epochs": training.epoch,
        "held_out_loss": training.best,
        "processor": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _show(columns: Mapping[str, Column], labels_are_real: bool) -> None:
    table = Table(box=None)
    table.add_column("" if labels_are_real else "by the ensemble's labels")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows_of(columns):
        table.add_row(*row)
    Console().print(table)
