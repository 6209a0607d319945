"""Turns an archive into the student that training starts from: a member's weights, or others drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optimise.distil.students import HeadsStudent, OneStudent, Student, last_module
from optimise.errors import OptimiseError
from optimise.examples.teacher import Teacher
from vmap_ensemble.models.architecture import build_plainly


def make_student(
    teacher: Teacher, folder: Path, into: str, architecture: str | None, heads: Sequence[str] | None, seed: int
) -> Student:
    """The student before its first step.

    Args:
        teacher: What it learns from.
        folder: The unpacked archive.
        into: `one` or `heads`.
        architecture: Of one student, where it is another than the members'; its weights are drawn.
        heads: Modules that each member keeps; the last one by default.
        seed: Of weights that are drawn.

    Raises:
        OptimiseError: It doesn't take the members' inputs or give their classes, or has no such heads.
    """
    classes = teacher.settings.num_classes
    if architecture:
        torch.manual_seed(seed)
        model = build_plainly(architecture, classes or teacher.classes, folder)
    else:
        model = teacher.build_member(0)
    model = model.float().eval()
    _check_output(architecture or teacher.task.architecture, model, teacher)
    if into == "one":
        return OneStudent(model, "student", classes, bool(architecture), teacher.call)
    own = heads or [last_module(model, sample_of(teacher), teacher.call)]
    return HeadsStudent(model, teacher.ensemble.names, own, classes, teacher.call)


def sample_of(teacher: Teacher) -> Tensor:
    """Two packed examples to try a network with."""
    return teacher.inputs.pack(teacher.task.sample_examples(2))


@torch.no_grad()
def _check_output(name: str, model: nn.Module, teacher: Teacher) -> None:
    """One forward of the student, before anything is asked: another input shape or width is found here."""
    try:
        student = OneStudent(model, "student", teacher.settings.num_classes, call=teacher.call)
        outputs = student(sample_of(teacher))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise OptimiseError(f"architecture '{name}': can't take inputs of {list(teacher.shape)} ({reason})") from None
    width = max(2, outputs.shape[-1])
    if width != teacher.classes:
        raise OptimiseError(f"architecture '{name}': gives {width} classes, the members have {teacher.classes}")
