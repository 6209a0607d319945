"""Turns an ensemble and what was made of it, both as they are served, and held-out examples into figures."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimise.examples.data import UNLABELLED
from optimise.examples.teacher import Teacher, Told
from optimise.gate.report import BATCHES, Column
from quality.scores import measure_auroc, score
from vmap_ensemble.core.aggregate import combine_classes
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.timing import time_call
from vmap_ensemble.process.memory import measure_peak

ROUNDS, WARM_UPS = 30, 3
States = Mapping[str, Mapping[str, Tensor]]
AT_ONCE = 256


@dataclass(frozen=True)
class Judged:
    """Log-probabilities of the same examples.

    Attributes:
        members: (M, N, C) of each member.
        together: (N, C) of all together.
        unlike: (M, K, C) of each member, of inputs of another kind.
    """

    members: Tensor
    together: Tensor
    unlike: Tensor | None


@dataclass(frozen=True)
class Made:
    """What a tool made of an ensemble.

    Attributes:
        title: Of its column, such as `student`.
        model: Its architecture; the weights don't matter.
        states: Name of the member -> its state dict.
        settings: What it will be served with.
        folder: What its task reads: labels, pretrained/, pruned.json; the archive's where nothing of it is new.
    """

    title: str
    model: nn.Module
    states: States
    settings: Mapping[str, Any]
    folder: Path


def settings_of(block: Mapping[str, Any], teacher: Teacher, architecture: str | None, members: int) -> dict[str, Any]:
    """The archive's settings for what was made of it; how inputs are prepared stays what it was.

    Args:
        block: The archive's own.
        teacher: The archive.
        architecture: Of what was made, where it is another.
        members: How many it has.
    """
    settings = {**block, "architecture": architecture or teacher.task.architecture}
    if members != len(teacher.ensemble.names):
        settings.pop("weights", None)  # of members that are one now
    weights = getattr(teacher.task, "weights", None)
    if architecture and weights is not None and not settings.get("transforms"):
        settings["transforms"] = str(weights)  # else those of the new architecture would be taken
    return settings


def judge(teacher: Teacher, made: Made, test: Told, unlike: Told | None) -> dict[str, Column]:
    """The figures of the members' mean, the ensemble and what was made of it.

    Args:
        teacher: The ensemble.
        made: Trained.
        test: What the ensemble said of held-out examples.
        unlike: What it said of inputs of another kind.
    """
    first = test.batch(torch.arange(1))
    served = Teacher(_serve(teacher, made, first))
    labels, _ = labels_to_judge_by(test)
    own = Judged(test.members, test.ensemble, None if unlike is None else unlike.members)
    columns = {
        "mean member": _mean_member(own, labels),
        "ensemble": _column(teacher, own, labels, own.together),
        made.title: _column(served, _say(served, test, unlike), labels, own.together),
    }
    alone = Teacher(_serve(teacher, _first_member(teacher, made), first))
    runs = alone.run, teacher.run, served.run
    times = measure_latencies(runs, first)
    rows = zip(columns.items(), times, runs, strict=True)
    return {
        name: dataclasses.replace(one, latency_ms=own_ms, peak_mib=_peak_mib(run, first, teacher.device))
        for (name, one), own_ms, run in rows
    }


def _serve(teacher: Teacher, made: Made, like: Tensor) -> Ensemble:
    """State dicts as an archive of theirs would be run: with the teacher's settings, on its device.

    In the mode that serves the teacher: another, chosen anew on a busy machine, would make it a comparison of modes.
    Where what was made can't be run so, its own is measured.
    """
    if made.settings.get("quantization"):  # which has one way to run
        return _run(teacher, made, like, {})
    try:
        return _run(teacher, made, like, {"execution": teacher.ensemble.execution.name})
    except LoadError:
        return _run(teacher, made, like, {"execution": "auto"})


def _run(teacher: Teacher, made: Made, like: Tensor, execution: Mapping[str, str]) -> Ensemble:
    run = {"dtype": made.settings.get("dtype", teacher.settings.dtype), **execution}
    on_host = {name: {key: tensor.cpu() for key, tensor in state.items()} for name, state in made.states.items()}
    return Ensemble.of(
        made.model.cpu(),
        on_host,
        example=teacher.inputs.arguments(like),
        settings={**made.settings, **run},
        task=type(teacher.task),
        device=str(teacher.device),
        folder=made.folder,
    )


def _first_member(teacher: Teacher, made: Made) -> Made:
    states = {teacher.ensemble.names[0]: teacher.forward.member_state(0)}
    settings = {**dataclasses.asdict(teacher.settings), "weights": None}
    return Made("", teacher.build_model(), states, settings, teacher.task.place.folder or made.folder)


def _say(served: Teacher, test: Told, unlike: Told | None) -> Judged:
    """Ask what was made what its teacher was asked."""
    parts = [served.both(rows) for rows in test.batches(AT_ONCE)]
    strange = None
    if unlike is not None:
        strange = torch.cat([served.members(rows).cpu() for rows in unlike.batches(AT_ONCE)], 1)
    members, together = torch.cat([own for own, _ in parts], 1), torch.cat([both for _, both in parts])
    return Judged(members.cpu(), together.cpu(), strange)


def _column(of: Teacher, judged: Judged, labels: Tensor, ensemble: Tensor) -> Column:
    found = score("", judged.together, labels)
    information = _information(of, judged.members)
    has_members = len(judged.members) > 1
    auroc = None
    if has_members and judged.unlike is not None:
        auroc = measure_auroc(information, _information(of, judged.unlike))
    members = of.forward.members
    return Column(
        accuracy=found.accuracy,
        nll=found.nll,
        ece=found.ece,
        agreement=(judged.together.argmax(-1) == ensemble.argmax(-1)).float().mean().item(),
        mutual_information=information.mean().item() if has_members else None,
        auroc=auroc,
        parameters=sum({id(tensor): tensor.numel() for tensor in members.tensors()}.values()),
        size_mib=of.forward.size_bytes / 2**20,
    )


def _mean_member(judged: Judged, labels: Tensor) -> Column:
    found = [score("", member, labels) for member in judged.members]
    agreement = (judged.members.argmax(-1) == judged.together.argmax(-1)).float().mean().item()
    accuracy, nll, ece = (statistics.mean(getattr(one, name) for one in found) for name in ("accuracy", "nll", "ece"))
    return Column(accuracy, nll, ece, agreement)


def labels_to_judge_by(told: Told) -> tuple[Tensor, bool]:
    """The labels, and whether they are real: where one is unknown, the ensemble's own stand in for all."""
    if bool((told.labels != UNLABELLED).all()):
        return told.labels, True
    return told.ensemble.argmax(-1), False


def _information(of: Teacher, members: Tensor) -> Tensor:
    weights = of.ensemble.member_weights.cpu().expand(-1, members.shape[1])
    combined = combine_classes(members, weights, of.settings.aggregation, 1.0, "log_probabilities")
    return combined.mutual_information


@torch.inference_mode()
def _peak_mib(run: Callable[[Tensor], Any], example: Tensor, device: torch.device) -> float | None:
    """What a forward that ran before holds at the largest batch, beside what stays."""
    batch = _repeated(example, BATCHES[-1])
    peak = measure_peak(lambda: run(batch), device)
    return None if peak is None else round(peak / 2**20, 2)


def _repeated(example: Tensor, size: int) -> Tensor:
    return example.expand(size, *example.shape[1:]).contiguous()


@torch.inference_mode()
def measure_latencies(runs: Sequence[Callable[[Tensor], Any]], example: Tensor) -> list[dict[str, float]]:
    """Median milliseconds of a forward at each batch size, in turn, so that a busy machine meets all alike.

    Args:
        runs: What is called with packed examples.
        example: One of them, (1, ...).
    """
    found: list[dict[str, float]] = [{} for _ in runs]
    for size in BATCHES:
        batch = _repeated(example, size)
        seconds: list[list[float]] = [[] for _ in runs]
        for number in range(WARM_UPS + ROUNDS):
            for own, run in zip(seconds, runs, strict=True):
                _, call_s = time_call(run, (batch,))
                if number >= WARM_UPS:
                    own.append(call_s)
        for own_ms, own in zip(found, seconds, strict=True):
            own_ms[str(size)] = round(1000 * statistics.median(own), 4)
    return found
