"""Turns an ensemble and rows into examples and soft targets on the disk, asked once however often training resumes.

test.bin            the examples as `inputs.py` packs them, one behind another
test.safetensors    members (M, N, C) log-probabilities, ensemble (N, C) probabilities, labels (N,)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optimise.errors import OptimiseError
from optimise.examples.data import UNLABELLED, Data
from optimise.examples.inputs import inputs_of
from vmap_ensemble.core.aggregate import OutputKind, combine_classes, log_probabilities
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError
from vmap_ensemble.many import Windows, load_windows
from vmap_ensemble.process.files import written_whole
from vmap_ensemble.tasks.classification import pick_outputs
from vmap_ensemble.tasks.task import Task
from vmap_ensemble.tasks.text.task import TextTask

Step = Callable[[int], None]
# Rows that are named when they are skipped; the others are counted.
NAMED = 5


@dataclass(frozen=True)
class Told:
    """What an ensemble says of N examples.

    Attributes:
        examples: (K, ...) of all rows, mapped from the disk.
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
    """An ensemble of classifiers of images, tensors or texts.

    Args:
        ensemble: What is asked.

    Raises:
        OptimiseError: It is no such ensemble.

    Attributes:
        inputs: How examples lie on the disk, and become arguments.
        shape: Of one of them there.
        classes: How many there are.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble, self.task, self.settings = ensemble, ensemble.task, ensemble.settings
        forward = ensemble.forward
        if not self.task.combines_classes or not isinstance(forward, EnsembleForward):
            told = f"'{self.settings.name}': expected classifiers of images, tensors or texts"
            raise OptimiseError(f"{told}; what {type(self.task).__name__} answers can't be learnt yet")
        self.forward: EnsembleForward = forward
        self.device, self.dtype = self.task.place.device, self.task.place.dtype
        self.inputs = inputs_of(self.task)
        self.shape = self.inputs.shape
        self.classes = self.members(self.inputs.pack(self.task.sample_examples(2))).shape[-1]

    @property
    def reads_texts(self) -> bool:
        """Whether examples are texts."""
        return isinstance(self.task, TextTask)

    @property
    def text_task(self) -> TextTask:
        """The task, where examples are texts."""
        return cast(TextTask, self.task)

    def build_model(self) -> nn.Module:
        """The members' architecture once more, in eval mode; its weights don't matter."""
        task = self.task
        # A task on texts keeps the one that it has, and its forward changes that one's attention.
        return Task.build_model(task) if self.reads_texts else task.build_model()

    def build_member(self, index: int) -> nn.Module:
        """One member alone, in float32 on the host."""
        model = self.build_model()
        model.load_state_dict({key: tensor.cpu() for key, tensor in self.forward.member_state(index).items()})
        return model.float().eval()

    def arguments(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Packed examples as the members' arguments, on their device and in their dtype."""
        args = self.inputs.arguments(batch.to(self.device))
        return tuple(arg.to(self.dtype) if arg.is_floating_point() else arg for arg in args)

    def call(self, model: Callable[..., Any], batch: Tensor) -> Any:
        """What a model of its own gives for packed examples that are where the model is."""
        args, keywords = self.forward.bind(*self.inputs.arguments(batch))
        return model(*args, **keywords)

    def outputs(self, batch: Tensor) -> Tensor:
        """(M, B, C) of all members, without a gradient."""
        with torch.no_grad():
            return pick_outputs(self.ensemble.outputs(*self.arguments(batch)), self.settings.num_classes)

    def run(self, batch: Tensor) -> Any:
        """The forward as it is served."""
        return self.ensemble.run(*self.arguments(batch))

    @property
    def kind(self) -> OutputKind:
        """What the members' outputs are; those of texts are always logits."""
        return "logits" if self.reads_texts else self.task.class_answers.kind

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """(..., C) log-probabilities of outputs, as the archive reads them."""
        return log_probabilities(outputs, self.settings.temperature, self.kind)

    def members(self, batch: Tensor) -> Tensor:
        """(M, B, C) log-probabilities of each member."""
        return self.log_probabilities(self.outputs(batch))

    def both(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Of each member, (M, B, C), and of all together, (B, C): log-probabilities."""
        outputs, settings = self.outputs(batch), self.settings
        weights = self.ensemble.member_weights.expand(-1, outputs.shape[1])
        combined = combine_classes(outputs, weights, settings.aggregation, settings.temperature, self.kind)
        together = combined.probabilities
        return self.log_probabilities(outputs), together.clamp_min(torch.finfo(torch.float32).tiny).log()

    def member(self, index: int, batch: Tensor) -> Tensor:
        """(B, C) log-probabilities of one member, through which a gradient flows to the batch."""
        outputs = self.forward.member(index, *self.arguments(batch))
        return self.log_probabilities(pick_outputs(with_axis(outputs), self.settings.num_classes))[0]


def with_axis(outputs: Any) -> Any:
    """The outputs of one model as those of one member: an axis in front of each tensor."""
    return pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, outputs)


def ask(teacher: Teacher, data: Data, place: Path, workers: int = 0, step: Step = lambda count: None) -> Told:
    """Ask the ensemble about all rows, or read what it said when that was done before.

    Args:
        teacher: What is asked.
        data: Rows and labels.
        place: Files without their suffix; .bin and .safetensors are written.
        workers: Processes that read and decode.
        step: Called with a number of rows when they are done.

    Raises:
        OptimiseError: No row can be read, or the disk is too small.
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
    dtype = getattr(torch, facts["dtype"])
    flat = torch.from_file(str(place.with_suffix(".bin")), shared=False, size=count * math.prod(shape), dtype=dtype)
    examples = flat.view(count, *shape)
    return Told(examples, torch.arange(count), skipped=(facts["skipped"], facts["skipped_count"]), **tensors)


def _check_space(folder: Path, teacher: Teacher, data: Data) -> None:
    needed = (data.count or 0) * math.prod(teacher.shape) * teacher.inputs.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OptimiseError(f"{folder}: the decoded examples take {needed >> 20} MiB, {free >> 20} are free")


def _write(teacher: Teacher, data: Data, place: Path, workers: int, step: Step) -> None:
    members, together, labels, skipped, row = [], [], [], [], 0
    with written_whole(place.with_suffix(".bin")) as scratch, scratch.open("wb") as file:
        for names, examples in load_windows(Windows(teacher.task, data.rows), workers):
            good = [index for index, example in enumerate(examples) if not isinstance(example, ItemError)]
            skipped += [f"{names[i]}: {e}" for i, e in enumerate(examples) if isinstance(e, ItemError)]
            if good:
                batch = teacher.inputs.pack([examples[index] for index in good])
                own, all_of_them = teacher.both(batch)
                finite = own.isfinite().all(-1).all(0).cpu()
                skipped += [f"{names[good[i]]}: a member gives NaN" for i in (~finite).nonzero().flatten().tolist()]
                file.write(batch[finite].numpy().tobytes())
                members.append(own.cpu()[:, finite])
                together.append(all_of_them.cpu()[finite])
                known = [UNLABELLED if data.labels is None else data.labels[row + index] for index in good]
                labels.append(torch.tensor(known)[finite])
            row += len(names)
            step(len(names))
        if not sum(map(len, labels)):
            raise OptimiseError(f"no row can be read; the first: {skipped[0] if skipped else 'there is none'}")
    dtype = str(teacher.inputs.dtype).removeprefix("torch.")
    counted = {"skipped": skipped[:NAMED], "skipped_count": len(skipped)}
    facts = {"shape": list(teacher.shape), "dtype": dtype, **counted}
    tensors = {"members": torch.cat(members, 1), "ensemble": torch.cat(together), "labels": torch.cat(labels)}
    # Last and at once: where it is, the examples are whole, too.
    with written_whole(place.with_suffix(".safetensors")) as table:
        save_file(tensors, table, {"facts": json.dumps(facts)})
