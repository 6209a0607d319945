"""Turns the options of the command into pruned members: cut, fine-tuned, judged and written, in that order."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from optimise.distil.start import sample_of
from optimise.distil.students import last_module
from optimise.distil.train import Recipe, Training
from optimise.errors import OptimiseError
from optimise.examples.sources import Parts, ask_all, facts_of, open_sources
from optimise.examples.teacher import Teacher
from optimise.gate.judge import Made, settings_of
from optimise.gate.verdict import finish, forget_verdict, tell_how_to_pack
from optimise.output.work import opened
from optimise.output.write import stage_files
from optimise.progress import progress_bar, train
from optimise.prune.structure import cut_members
from optimise.prune.students import MembersStudent, mask_smallest, share_of_zeros
from vmap_ensemble.archive.settings import read_block
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.core.states import spec_of
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.models.pruned import PRUNED_FILE, Pruned, is_pruned, read_pruned, widths_of
from vmap_ensemble.tasks.task import Task

TOOL = "prune"
# Examples from which batch normalisation learns what the cut channels give, before anything is trained.
SETTLING = 2048


def run(options: argparse.Namespace) -> int:
    """Prune an archive; returns the command's exit code.

    Raises:
        EnsembleError: One line that says what is refused.
    """
    with unpacked(options.archive) as folder:
        given = {"device": options.device, "execution": options.execution, "threads": options.threads}
        teacher = Teacher(Ensemble.load(folder, batch_sizes=(1, 8, options.batch_size), **given))
        _check(teacher)
        sources, recipe = open_sources(options, teacher), Recipe.of(options, teacher, 0.1, "plain")
        members = _mask(teacher, options.keep) if options.unstructured else cut_members(teacher, options.keep)
        made_with = {
            "tool": TOOL,
            "keep": options.keep,
            "unstructured": options.unstructured,
            **facts_of(options, teacher, sources),
            "recipe": vars(recipe),
        }
        with progress_bar() as progress, opened(options.output, made_with, options.anew) as work:
            new = None if options.unstructured else _stage(teacher, members, folder, work)
            parts = ask_all(TOOL, options, teacher, sources, work, progress)
        forget_verdict(options.output)
        student = MembersStudent(members, teacher.ensemble.names, teacher.settings.num_classes, teacher.call)
        with progress_bar() as progress:
            state = work / "training.pt"
            if not state.is_file():
                _settle(teacher, student, parts)
            training = Training(student, "heads", teacher, parts.learn, parts.held_out, recipe, state)
            train(TOOL, training, progress)
        made = _made(teacher, student, folder, new)
        told = {"keep": options.keep, **_zeros(options, student), **training.facts()}
        name = f"{teacher.settings.name}_pruned"
        return tell_how_to_pack(name, finish(options, teacher, folder, made, parts, name, told, training.history))


def _check(teacher: Teacher) -> None:
    task = teacher.task
    is_own = not teacher.reads_texts and type(task).build_model is not Task.build_model
    if is_own or not task.architecture:
        raise OptimiseError(
            f"'{teacher.settings.name}': its handler builds the model; expected the setting 'architecture'"
        )


def _mask(teacher: Teacher, keep: float) -> list[nn.Module]:
    members = [teacher.build_member(index) for index in range(len(teacher.ensemble.names))]
    last = last_module(members[0], sample_of(teacher), teacher.call)
    for member in members:
        mask_smallest(member, keep, last)
    return members


def _stage(teacher: Teacher, members: list[nn.Module], archive: Path, work: Path) -> Path:
    """What the new archive's task reads: the old one's files, and pruned.json, which gives the members' shapes.

    Raises:
        OptimiseError: What was cut isn't in layers whose width the file can say.
    """
    new = work / "new"
    shutil.rmtree(new, ignore_errors=True)
    stage_files(archive, new)
    spec = teacher.task.architecture
    base = read_pruned(spec, archive).architecture if is_pruned(spec) else spec
    stock = widths_of(build_architecture(base, teacher.settings.num_classes, archive))
    widths = {name: own for name, own in widths_of(members[0]).items() if own != stock[name]}
    (new / PRUNED_FILE).write_text(Pruned(base, widths).to_json(), encoding="utf-8")
    built = spec_of(build_architecture(PRUNED_FILE, teacher.settings.num_classes, new).state_dict())
    for member in members:
        for key, own in spec_of(member.state_dict()).items():
            if own != built.get(key):
                raise OptimiseError(f"{type(member).__name__}: '{key}' was cut, in a layer of a kind that can't be")
    return new


@torch.no_grad()
def _settle(teacher: Teacher, student: MembersStudent, parts: Parts) -> None:
    """Give batch normalisation the means and deviations that come through the channels that are left."""
    rows = torch.arange(min(SETTLING, len(parts.learn)))
    batches = [parts.learn.batch(part) for part in rows.split(256) if len(part) > 1]
    for member in student.members:
        update_bn(batches, _Called(member, teacher))


class _Called(nn.Module):
    """A member as a module of packed examples."""

    def __init__(self, member: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        self.member, self._call = member, teacher.call

    def forward(self, batch: torch.Tensor) -> Any:
        return self._call(self.member, batch)


def _made(teacher: Teacher, student: MembersStudent, archive: Path, new: Path | None) -> Made:
    """What is judged and served: the narrower architecture, or the old one with zeros in its weights."""
    block, states = read_block(archive), student.states()
    if new is None:
        return Made("pruned", teacher.build_model(), states, settings_of(block, teacher, None, len(states)), archive)
    model = build_architecture(PRUNED_FILE, teacher.settings.num_classes, new)
    return Made("pruned", model, states, settings_of(block, teacher, PRUNED_FILE, len(states)), new)


def _zeros(options: argparse.Namespace, student: MembersStudent) -> dict[str, Any]:
    if not options.unstructured:
        return {}
    shares = [share_of_zeros(state) for state in student.states().values()]
    print(
        f"prune: {sum(shares) / len(shares):.0%} of the weights are 0. Dense hardware multiplies zeros as any other "
        "number: nothing is faster or smaller for it"
    )
    return {"unstructured": True, "zeros": sum(shares) / len(shares)}
