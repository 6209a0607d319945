"""Turns state dicts into stacked parameters and buffers, one member at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vmap_ensemble.core.states import Spec, compare_members, find_shared, find_ties, spec_of
from vmap_ensemble.errors import LoadError


@dataclass(frozen=True)
class Member:
    """One row of the manifest: a file of the archive."""

    name: str
    file: str
    sha256: str
    source: str
    size_bytes: int
    # Of the checkpoint that the member was made from, so that a user finds their own file again.
    source_sha256: str = ""


@dataclass(frozen=True)
class StackedMembers:
    """M state dicts of one architecture, ready for vmap.

    Attributes:
        names: Names of the members, in the order of axis 0.
        stacked: Key -> tensor (M, ...): differs between members.
        shared: Key -> tensor (...): identical in all members, kept once.
        ties: Tied key -> kept key; in `stacked` or `shared` both hold the same tensor object.
        members: Rows of the manifest; empty when stacked in memory.
    """

    names: tuple[str, ...]
    stacked: dict[str, Tensor]
    shared: dict[str, Tensor]
    ties: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Those that differ between members, (M, ...), and those that all share, (...)."""
        return [*self.stacked.values(), *self.shared.values()]

    @property
    def device(self) -> torch.device:
        """Where the members are.

        Raises:
            LoadError: There is no tensor.
        """
        tensor = next(iter(self.tensors()), None)
        if tensor is None:
            raise LoadError("the members hold no tensors; expected at least one parameter or buffer")
        return tensor.device

    def spec(self) -> dict[str, Spec]:
        """Key -> (shape, dtype) of one member, for `check_architecture`."""
        own = {key: tensor[0] for key, tensor in self.stacked.items()}
        return spec_of({**own, **self.shared})

    def size_bytes(self) -> int:
        """Bytes of all tensors; tied ones count once."""
        tensors = {id(tensor): tensor for tensor in self.tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def stack_members(
    states: Mapping[str, Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    share: bool = True,
) -> StackedMembers:
    """Stack state dicts that are in memory, for a benchmark, a notebook or a test.

    Args:
        states: Name of the member -> its state dict; aliased tensors count as tied.
        device: Where the stack goes.
        dtype: Floating point tensors are cast to it; integers never. None keeps each tensor's own.

        share: Keep tensors once that are the same in all. Fresh networks agree in biases of 0 and scales of 1, which
            training would tell apart: a benchmark of them stacks those, too.

    Raises:
        MemberError: The state dicts don't have the same keys, shapes and dtypes.
    """
    compare_members({name: spec_of(state) for name, state in states.items()})
    rows = list(states.values())
    ties, shared_keys = find_ties(rows), set(find_shared(rows)) if share else set()
    kept = {key: spec for key, spec in spec_of(rows[0]).items() if key not in ties}
    stacked = allocate_stack({k: s for k, s in kept.items() if k not in shared_keys}, len(rows), device, dtype)
    for index, state in enumerate(rows):
        for key, stack in stacked.items():
            stack[index].copy_(state[key])
    shared = {key: place(rows[0][key], device, dtype) for key in kept if key in shared_keys}
    return with_ties(StackedMembers(tuple(states), stacked, shared, ties))


def allocate_stack(
    spec: Mapping[str, Spec], count: int, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {
        key: torch.empty((count, *shape), dtype=_target(own, dtype), device=device)
        for key, (shape, own) in spec.items()
    }


def place(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    # A copy even when nothing changes: the tensor is a view of a mapped file that is about to be closed.
    return tensor.detach().to(device=device, dtype=_target(tensor.dtype, dtype), copy=True)


def _target(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def move_members(members: StackedMembers, device: torch.device) -> StackedMembers:
    """The members on another device; tied keys stay one tensor, and what is there isn't copied."""
    moved = {id(tensor): tensor.to(device) for tensor in members.tensors()}
    stacked, shared = ({k: moved[id(t)] for k, t in tensors.items()} for tensors in (members.stacked, members.shared))
    return replace(members, stacked=stacked, shared=shared)


def with_ties(members: StackedMembers) -> StackedMembers:
    """Add the tied keys, each as the tensor object that stands for it."""
    for key, kept in members.ties.items():
        for tensors in (members.stacked, members.shared):
            if kept in tensors:
                tensors[key] = tensors[kept]
                break
        else:
            raise LoadError(f"members: '{key}' is tied to '{kept}', which no file holds")
    return members
