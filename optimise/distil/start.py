"""Turns an archive into the student that training starts from: a member's weights, or others drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from optimise.distil.students import Call, HeadsStudent, OneStudent, Student, last_module
from optimise.errors import OptimiseError
from optimise.examples.teacher import Teacher
from vmap_ensemble.errors import first_line
from vmap_ensemble.models.architecture import build_plainly

Into = Literal["one", "heads"]


@dataclass(frozen=True)
class Wanted:
    """Which student.

    Attributes:
        into: `one` or `heads`.
        architecture: Of one student, where it is another than the members'; its weights are drawn.
        heads: Modules that each member keeps; the last one by default.
        layers: Of a shallower encoder.
        directory: What save_pretrained wrote of another encoder.
        seed: Of weights that are drawn.
    """

    into: Into
    architecture: str | None = None
    heads: Sequence[str] | None = None
    layers: int | None = None
    directory: Path | None = None
    seed: int = 0


def make_student(teacher: Teacher, archive: Path, wanted: Wanted, folder: Path) -> tuple[Student, Path]:
    """The student before its first step, and the folder of what its task reads.

    Args:
        teacher: What it learns from.
        archive: The unpacked archive.
        wanted: Which one.
        folder: Made where the student reads something else than the archive holds.

    Raises:
        OptimiseError: It doesn't take the members' inputs or give their classes, or has no such heads.
    """
    _check(teacher, wanted)
    if wanted.layers is not None or wanted.directory is not None:
        return _make_encoder(teacher, archive, wanted, folder), folder
    classes = teacher.settings.num_classes
    if wanted.architecture:
        torch.manual_seed(wanted.seed)
        model = build_plainly(wanted.architecture, classes or teacher.classes, archive).float().eval()
    else:
        model = teacher.build_member(0)
    _check_output(f"architecture '{wanted.architecture or teacher.task.architecture}'", model, teacher, teacher.call)
    if wanted.into == "one":
        return OneStudent(model, "student", classes, bool(wanted.architecture), teacher.call), archive
    own = wanted.heads or [last_module(model, sample_of(teacher), teacher.call)]
    return HeadsStudent(model, teacher.ensemble.names, own, classes, teacher.call), archive


def _check(teacher: Teacher, wanted: Wanted) -> None:
    """Refuse what goes with the other kind of examples."""
    name = teacher.settings.name
    if teacher.reads_texts and wanted.architecture:
        raise OptimiseError(f"--architecture: '{name}' reads texts; name a directory with --to, or --layers")
    for option, given in (("--layers", wanted.layers), ("--to", wanted.directory)):
        if given is not None and not teacher.reads_texts:
            raise OptimiseError(f"{option} {given}: goes with encoders of texts; '{name}' reads none")


def _make_encoder(teacher: Teacher, archive: Path, wanted: Wanted, folder: Path) -> Student:
    from optimise.distil import encoders  # here: it imports transformers

    if wanted.directory is not None:
        encoders.stage_student(teacher, archive, encoders.open_directory(teacher, wanted.directory), folder)
        model = encoders.build_from_directory(teacher, wanted.directory, folder, wanted.seed)
    else:
        count = wanted.layers or 0
        encoders.stage_student(teacher, archive, encoders.fewer_layers(archive, count), folder)
        model = encoders.build_shallow(teacher, folder, count)
    encoders.check_positions(teacher, model)
    call = encoders.call_of(teacher, model)
    _check_output("the student", model, teacher, call)
    return OneStudent(model, "student", call=call)


def sample_of(teacher: Teacher) -> Tensor:
    """Two packed examples to try a network with."""
    return teacher.inputs.pack(teacher.task.sample_examples(2))


@torch.no_grad()
def _check_output(name: str, model: nn.Module, teacher: Teacher, call: Call) -> None:
    """One forward of the student, before anything is asked: another input shape or width is found here."""
    try:
        outputs = OneStudent(model, "student", teacher.settings.num_classes, call=call)(sample_of(teacher))
    except RuntimeError as error:
        told = f"can't take inputs of {list(teacher.shape)} ({first_line(error)})"
        raise OptimiseError(f"{name}: {told}") from None
    width = max(2, outputs.shape[-1])
    if width != teacher.classes:
        raise OptimiseError(f"{name}: gives {width} classes, the members have {teacher.classes}")
