"""Turns an ensemble and rows into examples and soft targets on the disk, asked once however often training resumes.

test.bin            the examples as the model takes them, float32, one behind another
test.safetensors    members (M, N, C) log-probabilities, ensemble (N, C) probabilities, labels (N,)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimise.distil.data import Data
from optimise.distil.errors import DistilError
from optimise.distil.losses import UNLABELLED
from optimise.distil.students import with_axis
from vmap_ensemble.core.aggregate import log_probabilities
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError
from vmap_ensemble.many import Windows, load_windows
from vmap_ensemble.process.files import written_whole
from vmap_ensemble.tasks.classification import pick_outputs
from vmap_ensemble.tasks.task import Task

Step = Callable[[int], None]
# Rows that are named when they are skipped; the others are counted.
NAMED = 5


@dataclass(frozen=True)
class Told:
    """What an ensemble says of N examples.

    Attributes:
        examples: (K, ...) float32 of all rows, mapped from the disk.
        index: (N,) int64, which of them these are.
        members: (M, N, C) log-probabilities of each member, at the archive's temperature.
        ensemble: (N, C) log-probabilities of all together, by the archive's aggregation and weights.
        labels: (N,) int64, UNLABELLED where there is none.
        skipped: Rows that can't be read: why, of the first; how many.
    """

    examples: Tensor
    index: Tensor
    members: Tensor
    ensemble: Tensor
    labels: Tensor
    skipped: tuple[list[str], int]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> Tensor:
        """(B, ...) examples, read from the disk."""
        return self.examples[self.index[rows]]

    def batches(self, size: int) -> Iterator[Tensor]:
        """All examples in order."""
        return (self.batch(rows) for rows in torch.arange(len(self)).split(size))

    def part(self, rows: Tensor) -> Told:
        """The same of some of the examples, which stay on the disk."""
        tables = self.members[:, rows], self.ensemble[rows], self.labels[rows]
        return Told(self.examples, self.index[rows], *tables, self.skipped)


class Teacher:
    """An ensemble of classifiers of tensors.

    Args:
        ensemble: What is asked.

    Raises:
        DistilError: It is no such ensemble, or it is quantised.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble, self.task, self.settings = ensemble, ensemble.task, ensemble.settings
        forward = ensemble.forward.one_vmap
        if type(self.task).answers is not Task.answers or forward is None:
            raise DistilError(
                f"'{self.settings.name}': expected classifiers of images or tensors; "
                f"{type(self.task).__name__} can't be distilled yet"
            )
        if getattr(self.settings, "quantization", None):
            raise DistilError(f"'{self.settings.name}': is quantised; distil the archive without 'quantization'")
        self.forward: EnsembleForward = forward
        self.device, self.dtype = self.task.place.device, self.task.place.dtype
        sample = self.collate(self.task.sample_examples(2))
        self.shape, self.classes = tuple(sample.shape[1:]), self.members(sample).shape[-1]

    def collate(self, examples: list[Any]) -> Tensor:
        """Parsed examples as the model's one argument, (B, ...) float32.

        Raises:
            DistilError: The model takes several arguments.
        """
        args = self.task.collate(examples)
        if len(args) != 1 or not isinstance(args[0], Tensor) or len(args[0]) != len(examples):
            raise DistilError(f"'{self.settings.name}': the model takes {len(args)} arguments; expected one tensor")
        return args[0].float()

    def outputs(self, batch: Tensor) -> Tensor:
        """(M, B, C) of all members, without a gradient."""
        with torch.no_grad():
            return pick_outputs(self.ensemble.outputs(batch.to(self.device, self.dtype)), self.settings.num_classes)

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """(..., C) log-probabilities of outputs, as the archive reads them."""
        return log_probabilities(outputs, self.settings.temperature, self.task.class_answers.kind)

    def members(self, batch: Tensor) -> Tensor:
        """(M, B, C) log-probabilities of each member."""
        return self.log_probabilities(self.outputs(batch))

    def both(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Of each member, (M, B, C), and of all together, (B, C): log-probabilities."""
        outputs = self.outputs(batch)
        together = self.task.probabilities(outputs, self.ensemble.member_weights)
        return self.log_probabilities(outputs), together.clamp_min(torch.finfo(torch.float32).tiny).log()

    def member(self, index: int, batch: Tensor) -> Tensor:
        """(B, C) log-probabilities of one member, through which a gradient flows to the batch."""
        outputs = self.forward.member(index, batch.to(self.dtype))
        return self.log_probabilities(pick_outputs(with_axis(outputs), self.settings.num_classes))[0]


def ask(teacher: Teacher, data: Data, place: Path, workers: int = 0, step: Step = lambda count: None) -> Told:
    """Ask the ensemble about all rows, or read what it said when that was done before.

    Args:
        teacher: What is asked.
        data: Rows and labels.
        place: Files without their suffix; .bin and .safetensors are written.
        workers: Processes that read and decode.
        step: Called with a number of rows when they are done.

    Raises:
        DistilError: No row can be read, or the disk is too small.
    """
    table = place.with_suffix(".safetensors")
    if not table.is_file():
        _check_space(place.parent, teacher, data)
        _write(teacher, data, place, workers, step)
    return read_told(place)


def read_told(place: Path) -> Told:
    """What `ask` has written."""
    with safe_open(place.with_suffix(".safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in ("members", "ensemble", "labels")}
        facts = json.loads(file.metadata()["facts"])
    count, shape = len(tensors["labels"]), facts["shape"]
    size = count * int(torch.tensor(shape).prod())
    flat = torch.from_file(str(place.with_suffix(".bin")), shared=False, size=size)
    examples = flat.view(count, *shape)
    return Told(examples, torch.arange(count), skipped=(facts["skipped"], facts["skipped_count"]), **tensors)


def _check_space(folder: Path, teacher: Teacher, data: Data) -> None:
    needed = (data.count or 0) * int(torch.tensor(teacher.shape).prod()) * 4
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DistilError(f"{folder}: the decoded examples take {needed >> 20} MiB, {free >> 20} are free")


def _write(teacher: Teacher, data: Data, place: Path, workers: int, step: Step) -> None:
    members, together, labels, skipped, row = [], [], [], [], 0
    with written_whole(place.with_suffix(".bin")) as scratch, scratch.open("wb") as file:
        for names, examples in load_windows(Windows(teacher.task, data.rows), workers):
            good = [index for index, example in enumerate(examples) if not isinstance(example, ItemError)]
            skipped += [f"{names[i]}: {e}" for i, e in enumerate(examples) if isinstance(e, ItemError)]
            if good:
                batch = teacher.collate([examples[index] for index in good])
                own, all_of_them = teacher.both(batch)
                finite = own.isfinite().all(-1).all(0).cpu()
                skipped += [f"{names[good[i]]}: a member gives NaN" for i in (~finite).nonzero().flatten().tolist()]
                file.write(batch.cpu().contiguous()[finite].numpy().tobytes())
                members.append(own.cpu()[:, finite])
                together.append(all_of_them.cpu()[finite])
                known = [UNLABELLED if data.labels is None else data.labels[row + index] for index in good]
                labels.append(torch.tensor(known)[finite])
            row += len(names)
            step(len(names))
        if not sum(map(len, labels)):
            raise DistilError(f"no row can be read; the first: {skipped[0] if skipped else 'there is none'}")
    facts = {"shape": list(teacher.shape), "skipped": skipped[:NAMED], "skipped_count": len(skipped)}
    tensors = {"members": torch.cat(members, 1), "ensemble": torch.cat(together), "labels": torch.cat(labels)}
    # Last and at once: where it is, the examples are whole, too.
    with written_whole(place.with_suffix(".safetensors")) as table:
        save_file(tensors, table, {"facts": json.dumps(facts)})
