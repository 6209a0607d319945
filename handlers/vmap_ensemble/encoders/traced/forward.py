"""Turns traced modules into one forward with the shape of an ensemble's: outputs (M, B, ...).

A traced module's class is opaque to torch.func, so the members run one after another; what makes them fast is
inside (no padding, fused layers). Outputs are named as transformers names them, so that the text modes read both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError

OUTPUTS = {1: ("logits",), 2: ("start_logits", "end_logits")}


class TracedForward(Forward):
    """The forwards of M traced modules.

    Args:
        modules: Loaded, on their device.
        members: Their names and manifest rows; it holds no tensors.
    """

    only_mode = "traced"
    reason = "traced modules, one after another"

    def __init__(self, modules: Sequence[torch.jit.ScriptModule], members: StackedMembers) -> None:
        self.modules, self.members = list(modules), members

    @property
    def device(self) -> torch.device:
        """Where the modules compute."""
        tensors = (*self.modules[0].parameters(), *self.modules[0].buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def member(self, index: int, *args: Tensor) -> dict[str, Tensor]:
        """Run one member alone: name -> (B, ...).

        Raises:
            LoadError: It gives neither logits nor start and end logits.
        """
        outputs = self.modules[index](*args)
        tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if len(tensors) not in OUTPUTS:
            name = self.members.names[index]
            raise LoadError(f"member '{name}': expected logits, or start and end logits, got {len(tensors)} outputs")
        return dict(zip(OUTPUTS[len(tensors)], tensors, strict=True))

    def __call__(self, *args: Tensor) -> dict[str, Tensor]:
        """Run every member: name -> (M, B, ...)."""
        rows = [self.member(index, *args) for index in range(len(self.modules))]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    loop = __call__

    def part(self, start: int, stop: int) -> TracedForward:
        """The forward of the members from `start` to `stop`, exclusive."""
        rows = dataclasses.replace(
            self.members, names=self.members.names[start:stop], members=self.members.members[start:stop]
        )
        return TracedForward(self.modules[start:stop], rows)
