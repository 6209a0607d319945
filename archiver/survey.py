"""Turns named checkpoints into the certainty that they make one ensemble: shared, tied, and how large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from archiver.pretrained import adapt_state
from archiver.source import Source
from vmap_ensemble.archive.checkpoints import read_state_dict
from vmap_ensemble.archive.manifest import hash_file
from vmap_ensemble.core.states import (
    State,
    check_finite,
    compare_members,
    find_shared,
    find_ties,
    fit_to_architecture,
    spec_of,
)
from vmap_ensemble.models.architecture import TRANSFORMERS, build_architecture, infer_num_classes

Step = Callable[[str], None]


@dataclass(frozen=True)
class Survey:
    """Members that were found to stack, still mapped from their files."""

    sources: tuple[Source, ...]
    hashes: tuple[str, ...]
    states: tuple[State, ...]
    shared: tuple[str, ...]
    ties: dict[str, str]
    num_classes: int | None
    # False when the archive's settings name no architecture, as for text models: the handler checks at load.
    architecture_checked: bool
    # Keys of the checkpoints that the architecture has no use for, such as heads of an embedding's members.
    left_out: tuple[str, ...] = ()

    def kept_keys(self) -> list[str]:
        """Keys that are stored: all but the tied ones."""
        return [key for key in self.states[0] if key not in self.ties]

    def own_keys(self) -> list[str]:
        """Keys that differ between members, one stored per member."""
        return [key for key in self.kept_keys() if key not in self.shared]

    def shared_bytes(self) -> int:
        """Bytes of what is identical in all members."""
        return sum(_bytes(self.states[0][key], None) for key in self.shared if key not in self.ties)

    def stacked_bytes(self, dtype: torch.dtype) -> int:
        """Memory of all members when stacked, floating point tensors as `dtype`."""
        first, count = self.states[0], len(self.states)
        own = sum(_bytes(first[key], dtype) for key in self.own_keys())
        shared = sum(_bytes(first[key], dtype) for key in self.kept_keys() if key in self.shared)
        return own * count + shared


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    cast = dtype is not None and tensor.is_floating_point()
    return tensor.numel() * (dtype.itemsize if cast and dtype is not None else tensor.element_size())


def survey_members(
    sources: list[Source],
    architecture: str,
    num_classes: int | None,
    folder: Path | None,
    allow_nan: bool,
    step: Step,
) -> Survey:
    """Read and check all members against each other and against the architecture.

    Args:
        sources: At least one member.
        architecture: As in `build_architecture`; empty when only the handler knows it.
        num_classes: Width of the last layer; read from the first member when None.
        folder: Where model.py or pretrained/ lies, if the architecture needs one.
        allow_nan: Archive NaN and infinite weights nevertheless.
        step: Called with a line of what is done, once per member and once for the comparison.

    Raises:
        MemberError: One line that names the file, the key, and both shapes or dtypes.
        SettingsError: The architecture can't be built.
    """
    labels = _labels(sources)
    states: list[State] = []
    hashes: list[str] = []
    left_out: list[str] = []
    for source in sources:
        step(f"read {source.name}")
        states.append(read_state_dict(source.path))
        hashes.append(hash_file(source.path))
    if architecture:
        num_classes = num_classes or infer_num_classes(
            architecture, {key: spec[0] for key, spec in spec_of(states[0]).items()}
        )
        model = build_architecture(architecture, num_classes, folder)
        if architecture.startswith(TRANSFORMERS):
            states, left_out = _adapt(states, model, architecture)
        states = [fit_to_architecture(label, state, model) for label, state in zip(labels, states, strict=True)]
    compare_members({label: spec_of(state) for label, state in zip(labels, states, strict=True)})
    for label, state in zip(labels, states, strict=True):
        if not allow_nan:
            step(f"check {label}")
            check_finite(label, state)
    step("compare")
    return Survey(
        sources=tuple(sources),
        hashes=tuple(hashes),
        states=tuple(states),
        shared=tuple(find_shared(list(states))),
        ties=find_ties(states),
        num_classes=num_classes,
        architecture_checked=bool(architecture),
        left_out=tuple(left_out),
    )


def _adapt(states: list[State], model: nn.Module, architecture: str) -> tuple[list[State], list[str]]:
    """The members with the keys of a transformers model, and what any of them has beyond those."""
    embedding = architecture == f"{TRANSFORMERS}embedding"
    adapted = [adapt_state(state, model, embedding) for state in states]
    return [state for state, _ in adapted], sorted({key for _, keys in adapted for key in keys})


def _labels(sources: list[Source]) -> list[str]:
    """What errors call the members: the file's name, with the member's where two files share one."""
    shown = [source.shown for source in sources]
    return [
        source.shown if shown.count(source.shown) == 1 else f"{source.shown} ({source.name})" for source in sources
    ]
