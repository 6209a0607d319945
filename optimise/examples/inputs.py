"""Turns examples into one tensor per batch that lies on the disk, and such a tensor into the model's arguments.

images, tensors     (B, ...) float32, as the model takes them
texts               (B, A, S) int32: ids, mask, token types, padded to the longest that a text may be
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optimise.errors import OptimiseError
from optimise.examples.change import change, change_tokens
from vmap_ensemble.tasks.task import Task
from vmap_ensemble.tasks.text.task import TextTask


class Inputs(Protocol):
    """How the examples of a task lie on the disk.

    Attributes:
        shape: Of one example.
        dtype: Of all.
        is_smooth: Whether a step along a gradient leads to another example.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_smooth: bool

    def pack(self, examples: Sequence[Any]) -> Tensor:
        """What the task has parsed -> (B, *shape) on the host."""

    def arguments(self, batch: Tensor) -> tuple[Tensor, ...]:
        """(B, *shape) -> the model's arguments, each (B, ...), where the batch is."""

    def change(self, batch: Tensor) -> Tensor:
        """Examples near those of a batch and between them; see `change`."""


class TensorInputs:
    """Examples that are one tensor each.

    Args:
        task: Collates them.

    Raises:
        OptimiseError: The model takes several arguments.
    """

    dtype = torch.float32
    is_smooth = True

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shape = tuple(self.pack(task.sample_examples(2)).shape[1:])

    def pack(self, examples: Sequence[Any]) -> Tensor:
        """See `Inputs`."""
        args = self.task.collate(examples)
        if len(args) != 1 or not isinstance(args[0], Tensor) or len(args[0]) != len(examples):
            name = self.task.settings.name
            raise OptimiseError(f"'{name}': the model takes {len(args)} arguments; expected one tensor")
        return args[0].float().cpu()

    def arguments(self, batch: Tensor) -> tuple[Tensor, ...]:
        """See `Inputs`."""
        return (batch,)

    def change(self, batch: Tensor) -> Tensor:
        """See `Inputs`."""
        return change(batch)


class TextInputs:
    """Texts, as the ids, the mask and the token types of a tokenizer.

    Args:
        task: Tokenises and pads them.
    """

    dtype = torch.int32
    is_smooth = False

    def __init__(self, task: TextTask) -> None:
        self.task, self.names = task, task.argument_names
        self.shape: tuple[int, ...] = (len(self.names), task.mode.max_length)
        tokenizer = task.tokenizer
        self.mask_id = tokenizer.mask_token_id
        self._special = torch.tensor(tokenizer.all_special_ids)

    def pack(self, examples: Sequence[Any]) -> Tensor:
        """See `Inputs`."""
        args = [tensor.cpu() for tensor in self.task.collate(examples)]
        batch = torch.empty(len(args[0]), *self.shape, dtype=self.dtype)
        for number, (name, tensor) in enumerate(zip(self.names, args, strict=True)):
            batch[:, number] = self.task.pads.get(name, 0)
            batch[:, number, : tensor.shape[1]] = tensor
        return batch

    def arguments(self, batch: Tensor) -> tuple[Tensor, ...]:
        """See `Inputs`; cut to the longest text of the batch."""
        width = int(batch[:, self.names.index("attention_mask")].sum(1).max())
        return tuple(batch[:, :, :width].long().unbind(1))

    def change(self, batch: Tensor) -> Tensor:
        """See `Inputs`; as it is where the tokenizer has no mask token."""
        if self.mask_id is None:
            return batch
        ids = self.names.index("input_ids")
        changed = batch.clone()
        changed[:, ids] = change_tokens(batch[:, ids], self.mask_id, self._special)
        return changed


def inputs_of(task: Task) -> Inputs:
    """How a task's examples lie on the disk.

    Raises:
        OptimiseError: Its model takes several arguments that aren't those of texts.
    """
    if isinstance(task, TextTask):
        return TextInputs(task)
    return TensorInputs(task)
