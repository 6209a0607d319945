"""Turns a student, examples and soft targets into a trained student, by epochs, each of which survives a kill."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from optimise.distil.losses import joint_loss, soft_target_loss
from optimise.distil.students import Student, train_mode
from optimise.examples.change import CHANGED, seek_disagreement
from optimise.examples.data import UNLABELLED
from optimise.examples.teacher import Teacher, Told
from vmap_ensemble.core.aggregate import OutputKind, log_probabilities
from vmap_ensemble.process.files import written_whole
from vmap_ensemble.tasks.classification import kind_for

Into = Literal["one", "heads"]
WARM_UP = 0.05
AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP = 1.0


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        epochs: Passes over the examples, at most.
        batch_size: Examples in a step.
        learning_rate: The highest, behind the warm-up; it falls as a cosine to 0.
        weight_decay: Of AdamW.
        temperature: T of the soft targets.
        label_weight: Share of the loss that labels have, 0 to 1.
        augment: `none`, `plain` or `diverse`.
        patience: Epochs without a lower held-out loss behind which training stops.
        amp: `none`, `bf16` or `fp16`, the type of the student's matrix products and convolutions while it is trained;
            its weights, the loss and what it is judged by stay float32.
        seed: Of everything that is drawn.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    temperature: float = 2.0
    label_weight: float = 0.0
    augment: str = "diverse"
    patience: int = 5
    amp: str = "none"
    seed: int = 0

    @classmethod
    def of(cls, options: argparse.Namespace, teacher: Teacher, label_weight: float, augment: str) -> Recipe:
        """What a command line says.

        Args:
            options: Of a command that trains.
            teacher: Encoders of texts learn at a tenth of the rate where none is given.
            label_weight: Where none is given.
            augment: Where none is given.
        """
        return cls(
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.lr or (1e-4 if teacher.reads_texts else 1e-3),
            weight_decay=options.weight_decay,
            temperature=options.temperature,
            label_weight=label_weight if options.label_weight is None else options.label_weight,
            augment=options.augment or augment,
            patience=options.patience,
            amp=options.amp or ("bf16" if teacher.device.type == "cuda" else "none"),
            seed=options.seed,
        )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: a line up, then a cosine."""
        warm = max(1, round(WARM_UP * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def targets_of(into: Into, members: Tensor, ensemble: Tensor) -> Tensor:
    """What the student's outputs are to be: (M, B, C) of each member, or (1, B, C) of all together."""
    return members if into == "heads" else ensemble[None]


class Training:
    """One run of training, which goes on where it was when it is made anew.

    Args:
        student: With the weights that it starts from; trained in place, on the teacher's device.
        into: What its outputs are.
        teacher: Asked about examples that are changed on the way.
        learn: Examples, soft targets and labels.
        held_out: What decides when it stops.
        recipe: How.
        state: File of the state; one that exists is gone on from.

    Attributes:
        epoch: Epochs that are done.
        history: Per epoch the loss and the held-out loss.
        best: The least held-out loss.
    """

    def __init__(
        self, student: Student, into: Into, teacher: Teacher, learn: Told, held_out: Told, recipe: Recipe, state: Path
    ) -> None:
        self.student, self.into, self.teacher, self.recipe, self.path = student, into, teacher, recipe, state
        self.learn, self.held_out = learn, held_out
        self.targets = targets_of(into, learn.members, learn.ensemble)
        self.student.to(teacher.device)
        self.kind: OutputKind = self._find_kind()
        self.optimizer = torch.optim.AdamW(
            [tensor for tensor in student.parameters() if tensor.requires_grad],
            recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        # Small gradients would be 0 in float16; bfloat16 has float32's exponents.
        self.scaler = torch.amp.GradScaler(teacher.device.type, enabled=recipe.amp == "fp16")
        self.epoch, self.best, self.since_best = 0, math.inf, 0
        self.history: list[tuple[float, float]] = []
        self.best_state: dict[str, Tensor] = copy.deepcopy(student.state_dict())
        if state.is_file():
            self._go_on()

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.learn) // self.recipe.batch_size)

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or the held-out loss no longer falls."""
        return self.epoch >= self.recipe.epochs or self.since_best >= self.recipe.patience

    def run(
        self, step: Callable[[], None] = lambda: None, told: Callable[[int, float], None] = lambda *_: None
    ) -> None:
        """Train until it is done, and leave the student with the weights that were best.

        Args:
            step: Called behind each step.
            told: Called behind each epoch with its number, from 1, and the held-out loss.
        """
        while not self.is_done:
            loss = self._run_epoch(step)
            held_out = self.measure(self.held_out)
            self.epoch, self.since_best = self.epoch + 1, self.since_best + 1
            self.history.append((loss, held_out))
            if held_out < self.best:
                self.best, self.since_best = held_out, 0
                self.best_state = copy.deepcopy(self.student.state_dict())
            self._save()
            told(self.epoch, held_out)
        self.student.load_state_dict(self.best_state)
        self.student.eval()

    def _run_epoch(self, step: Callable[[], None]) -> float:
        # A seed per epoch: one that is begun again draws what it drew, whatever was drawn before.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.epoch)
        train_mode(self.student)
        total = 0.0
        batches = torch.randperm(len(self.learn)).split(self.recipe.batch_size)
        for number, rows in enumerate(batches):
            if len(rows) > 1 or len(batches) == 1:  # batch normalisation knows no batch of one
                total += self._step(rows, self.epoch * len(batches) + number)
            step()
        return total / len(batches)

    def _step(self, rows: Tensor, number: int) -> float:
        device, recipe = self.teacher.device, self.recipe
        batch, targets, labels = self._change(
            self.learn.batch(rows).to(device),
            self.targets[:, rows].to(device),
            self.learn.labels[rows].to(device),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(number, recipe.epochs * self.steps)
        with self._autocast():
            said = self.say(batch)
        loss = joint_loss(said, targets, labels, recipe.temperature, recipe.label_weight)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.scaler.step(self.optimizer)  # not where a gradient is infinite
        self.scaler.update()
        return loss.item()

    def _change(self, batch: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A share of the batch changed, and asked about; its labels are of other inputs now."""
        count = int(len(batch) * CHANGED)
        if self.recipe.augment == "none" or not count:
            return batch, targets, labels
        changed = self.teacher.inputs.change(batch)[:count]  # all of them: examples are mixed with one another
        if self.recipe.augment == "diverse":
            index = int(torch.randint(len(self.teacher.ensemble.names), ()))
            half = count // 2
            further = seek_disagreement(changed[half:], lambda x: self.teacher.member(index, x))
            changed = torch.cat((changed[:half], further))
        asked = targets_of(self.into, *self.teacher.both(changed))
        unlabelled = torch.full_like(labels[:count], UNLABELLED)
        return (
            torch.cat((changed, batch[count:])),
            torch.cat((asked, targets[:, count:]), 1),
            torch.cat((unlabelled, labels[count:])),
        )

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"recipe": vars(self.recipe), "epochs": self.epoch, "held_out_loss": self.best}

    def say(self, batch: Tensor) -> Tensor:
        """(H, B, C) log-probabilities of the student."""
        return log_probabilities(self.student(batch), self.teacher.settings.temperature, self.kind)

    @torch.no_grad()
    def measure(self, told: Told) -> float:
        """The loss of soft targets at temperature 1: how far what is served is from what the teacher says."""
        self.student.eval()
        targets, total = targets_of(self.into, told.members, told.ensemble), 0.0
        for rows in torch.arange(len(told)).split(256):
            said = self.say(told.batch(rows).to(self.teacher.device))
            total += soft_target_loss(said, targets[:, rows].to(said)).item() * len(rows)
        return total / len(told)

    def _autocast(self) -> AbstractContextManager[Any]:
        amp = self.recipe.amp
        return torch.autocast(self.teacher.device.type, AMP_DTYPES[amp], enabled=amp != "none")

    @torch.no_grad()
    def _find_kind(self) -> OutputKind:
        if self.teacher.reads_texts:
            return self.teacher.kind
        self.student.eval()
        return kind_for(
            self.teacher.settings, self.student(self.learn.batch(torch.arange(2)).to(self.teacher.device))
        )

    def _save(self) -> None:
        state = {
            "epoch": self.epoch,
            "best": self.best,
            "since_best": self.since_best,
            "history": self.history,
            "student": self.student.state_dict(),
            "best_state": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with written_whole(self.path) as scratch:
            torch.save(state, scratch)

    def _go_on(self) -> None:
        state = torch.load(self.path, map_location=self.teacher.device, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_state = state["best_state"]
        self.epoch, self.best, self.since_best = state["epoch"], state["best"], state["since_best"]
        self.history = [tuple(pair) for pair in state["history"]]
