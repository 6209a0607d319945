"""Turns sample inputs into the calibration of an archive, and the verdict whether its precision may be served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archiver.blocks.request import ArchiveRequest
from archiver.packing.staged import open_task
from vmap_ensemble.archive.precision import Precision
from vmap_ensemble.archive.settings import load_settings
from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.core.forward import as_one_vmap
from vmap_ensemble.errors import ArchiveError, ItemError, LoadError
from vmap_ensemble.execution.int8.calibration import calibrate
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.starting import read_weights
from vmap_ensemble.tasks.classification import kind_for, pick_outputs
from vmap_ensemble.tasks.task import Task

BATCH = 16

Step = Callable[[str], None]
Batches = list[tuple[Tensor, ...]]


def find_samples(name: str, paths: Sequence[Path]) -> list[Path]:
    """Files of samples: those given, and those directly inside of given folders, by name.

    Raises:
        ArchiveError: A path doesn't exist, or a folder holds no files.
    """
    files: list[Path] = []
    for path in paths:
        inside = path.iterdir() if path.is_dir() else [path]
        found = sorted(file for file in inside if file.is_file() and not file.name.startswith("."))
        if not found:
            raise ArchiveError(f"'{name}': samples: {path.name}: expected a file, or a folder with files")
        files += found
    return files


def precision_name(settings: Any) -> str | None:
    """The precision that settings ask for, where it isn't float32."""
    if getattr(settings, "quantization", None):
        return str(settings.quantization)
    return None if settings.dtype == "fp32" else str(settings.dtype)


def check_precision(handler: type[Task], request: ArchiveRequest, settings: Any) -> None:
    """Refuse, before any work, what can't be archived.

    Raises:
        ArchiveError: int8 that is calibrated without samples, or samples that can't be found.
    """
    if precision_name(settings) == "int8" and handler.calibrates and not request.samples:
        raise ArchiveError(
            f"'{request.name}': quantization int8 is calibrated on inputs like those that will be served; give some "
            "dozens with --samples FILES_OR_FOLDER, or in the key 'samples'"
        )
    find_samples(request.name, request.samples)


def judge_precision(handler: type[Task], request: ArchiveRequest, stage: Path, step: Step) -> Precision | None:
    """Calibrate int8, run the samples in float32 and as archived, and write precision.json.

    Args:
        handler: The handler's class.
        request: Names the samples, and the share of predictions that may change.
        stage: The archive's root, complete but for precision.json.
        step: Called with a line of what is done, three times.

    Returns:
        What was found; None where float32 is served, or there are no samples.

    Raises:
        ArchiveError: More predictions change than may, or a sample can't be read.
        EnsembleError: The precision can't be had for these members.
    """
    settings = load_settings(stage, handler.settings_class)
    name = precision_name(settings)
    if name is None or not request.samples:
        return None
    float32 = {"dtype": "fp32"} if name != "int8" else {"quantization": None}
    step("read samples")
    task = open_task(handler, stage, **float32)
    batches = _read_batches(request.name, task, find_samples(request.name, request.samples))
    step("run float32")
    reference = task.make_forward(Phases())
    with torch.inference_mode():
        expected = _predict(task, reference.loop, batches, request.name)
        calibrates = name == "int8" and handler.calibrates
        ranges = calibrate(as_one_vmap(reference).model, reference.members, batches) if calibrates else {}
    step(f"run {name}")
    precision = Precision(name, 0, 0, 0.0, reference.members.names if ranges else (), ranges)
    with torch.inference_mode():
        if name == "int8":
            quantised = task.quantise(reference, precision)
            got = _predict(task, quantised, batches, request.name)
        else:
            cast = open_task(handler, stage)
            forward = cast.make_forward(Phases())
            got = _predict(cast, forward.loop, _cast(batches, cast.place.dtype), request.name)
    found = _compare(precision, expected, got)
    _check(found, request)
    found.write(stage)
    return found


def _read_batches(name: str, task: Task, files: Sequence[Path]) -> Batches:
    examples = []
    for file in files:
        try:
            data = file.read_bytes()
            examples.append(task.parse(json.loads(data) if file.suffix == ".json" else data))
        except (ItemError, OSError, ValueError) as error:
            raise ArchiveError(f"'{name}': sample {file.name}: {error}") from None
    starts = range(0, len(examples), BATCH)
    return [task.collate(examples[start : start + BATCH]) for start in starts]


def _cast(batches: Batches, dtype: torch.dtype) -> Batches:
    return [tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in batch) for batch in batches]


def _predict(task: Task, run: Callable[..., Any], batches: Batches, name: str) -> list[ClassPrediction]:
    settings = task.settings
    weights = read_weights(settings, task.place.names)
    rows = []
    for batch in batches:
        outputs = run(*batch)
        try:
            picked = pick_outputs(outputs, settings.num_classes).float()
            kind = kind_for(settings, outputs)
        except LoadError as error:
            raise ArchiveError(
                f"'{name}': samples judge the precision of classifiers, whose output is (batch, classes); "
                f"leave --samples out for this handler ({error})"
            ) from None
        weight = weights.expand(-1, picked.shape[1])
        rows.append(combine_classes(picked, weight, settings.aggregation, settings.temperature, kind))
    return rows


def _compare(precision: Precision, expected: list[ClassPrediction], got: list[ClassPrediction]) -> Precision:
    pairs = list(zip(expected, got, strict=True))
    changed = sum(int((a.ranking[:, 0] != b.ranking[:, 0]).sum()) for a, b in pairs)
    largest = max(float((a.probabilities - b.probabilities).abs().max()) for a, b in pairs)
    samples = sum(len(a.ranking) for a, _ in pairs)
    return dataclasses.replace(
        precision, samples=samples, changed_predictions=changed, largest_probability_difference=largest
    )


def _check(found: Precision, request: ArchiveRequest) -> None:
    allowed, share = request.max_changed_predictions, found.changed_predictions / found.samples
    if share > allowed:
        raise ArchiveError(
            f"'{request.name}': {describe(found)}; more than max_changed_predictions, {allowed:.2%}. Give more or "
            "more typical samples, raise that key if such answers will do, or serve float32"
        )


def describe(found: Precision) -> str:
    """One line on what a precision costs."""
    share = found.changed_predictions / found.samples
    return (
        f"{found.name} changes {found.changed_predictions} of {found.samples} predictions ({share:.2%}) on the "
        f"samples, a probability by {found.largest_probability_difference:.4f} at most"
    )
