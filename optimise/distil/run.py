"""Turns the options of the command into a student: asked, trained, judged and written, in that order."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from optimise.distil.start import Wanted, make_student
from optimise.distil.train import Recipe, Training
from optimise.errors import OptimiseError
from optimise.examples.sources import Sources, ask_all, facts_of, open_sources
from optimise.examples.teacher import Teacher
from optimise.gate.judge import Made, settings_of
from optimise.gate.verdict import finish, forget_verdict, tell_how_to_pack
from optimise.output.work import opened
from optimise.progress import progress_bar, train
from vmap_ensemble.archive.settings import read_block
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.ensemble import Ensemble

TOOL = "distil"


def run(options: argparse.Namespace) -> int:
    """Distil an archive; returns the command's exit code.

    Raises:
        EnsembleError: One line that says what is refused.
    """
    with unpacked(options.archive) as folder, tempfile.TemporaryDirectory(prefix="distil-") as scratch:
        given = {"device": options.device, "execution": options.execution, "threads": options.threads}
        teacher = Teacher(Ensemble.load(folder, batch_sizes=(1, 8, options.batch_size), **given))
        if options.to == "heads" and len(teacher.ensemble.names) < 2:
            raise OptimiseError(f"{options.archive.name}: has one member; heads need at least two")
        sources = open_sources(options, teacher)
        recipe = recipe_of(options, teacher)
        wanted = Wanted(
            options.to, options.architecture, options.head, options.layers, options.directory, options.seed
        )
        student, new = make_student(teacher, folder, wanted, Path(scratch) / "new")
        with (
            progress_bar() as progress,
            opened(options.output, _made_with(options, teacher, sources, recipe), options.anew) as work,
        ):
            parts = ask_all(TOOL, options, teacher, sources, work, progress)
        forget_verdict(options.output)
        with progress_bar() as progress:
            training = Training(
                student, options.to, teacher, parts.learn, parts.held_out, recipe, work / "training.pt"
            )
            train(TOOL, training, progress)
        states = student.states()
        settings = settings_of(read_block(folder), teacher, options.architecture, len(states))
        made = Made("student", student.model, states, settings, new)
        name, told = f"{teacher.settings.name}_{options.to}", {"to": options.to, **training.facts()}
        return tell_how_to_pack(name, finish(options, teacher, folder, made, parts, name, told, training.history))


def recipe_of(options: argparse.Namespace, teacher: Teacher) -> Recipe:
    """How it is trained, with what the options leave to the kind of student and examples."""
    is_heads = options.to == "heads"
    if options.augment == "diverse" and not teacher.inputs.is_smooth:
        raise OptimiseError("--augment diverse: follows a gradient, which texts have none; expected plain or none")
    label_weight = 0.0 if is_heads else 0.1
    augment = "diverse" if is_heads and teacher.inputs.is_smooth else "plain"
    return Recipe.of(options, teacher, label_weight, augment)


def _made_with(options: argparse.Namespace, teacher: Teacher, sources: Sources, recipe: Recipe) -> dict[str, Any]:
    """What decides on the student."""
    return {
        "tool": TOOL,
        "to": options.to,
        "architecture": options.architecture,
        "head": options.head,
        "layers": options.layers,
        "directory": str(options.directory.absolute()) if options.directory else None,
        **facts_of(options, teacher, sources),
        "recipe": vars(recipe),
    }
