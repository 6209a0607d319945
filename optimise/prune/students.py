"""Turns pruned members into one student that learns to say what each of them said before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from optimise.distil.students import Call, Student, call_plainly
from optimise.examples.teacher import with_axis
from vmap_ensemble.tasks.classification import pick_outputs

ORIGINAL, MASK = "_orig", "_mask"


class MembersStudent(Student):
    """M networks that share nothing, one after another.

    Args:
        members: In the order of the ensemble.
        names: Of them.
        classes: Width of the output, where a model gives several tensors.
        call: How a model is called.
    """

    def __init__(
        self, members: Sequence[nn.Module], names: Sequence[str], classes: int | None, call: Call = call_plainly
    ) -> None:
        super().__init__()
        self.learns_statistics = True  # what batch normalisation met before came through more channels
        self.members = nn.ModuleList(member.requires_grad_(True) for member in members)
        self.names, self.classes, self.call = tuple(names), classes, call

    def forward(self, batch: Tensor) -> Tensor:
        """(B, ...) -> (M, B, C)."""
        own = [pick_outputs(with_axis(self.call(member, batch)), self.classes) for member in self.members]
        return torch.cat(own)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Name of the member -> its state dict; masked weights are 0."""
        return {name: plain_state(member) for name, member in zip(self.names, self.members, strict=True)}


def mask_smallest(member: nn.Module, keep: float, last: str) -> None:
    """Mask the smallest weights of all convolutions and linear layers together, the last layer's excepted.

    Args:
        member: Keeps masks and masked weights until `plain_state`.
        keep: Share of the weights that stays.
        last: Name of the last layer.
    """
    layers = [m for name, m in member.named_modules() if isinstance(m, _ConvNd | nn.Linear) and name != last]
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=1 - keep)


def plain_state(member: nn.Module) -> dict[str, Tensor]:
    """A state dict without masks: what they hide is 0."""
    state = {key: tensor.detach() for key, tensor in member.state_dict().items()}
    masks = {key.removesuffix(MASK): state.pop(key) for key in list(state) if key.endswith(MASK)}
    return {
        key.removesuffix(ORIGINAL): tensor * masks[key.removesuffix(ORIGINAL)] if key.endswith(ORIGINAL) else tensor
        for key, tensor in state.items()
    }


def share_of_zeros(state: dict[str, Tensor]) -> float:
    """Of the weights that have several axes."""
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
