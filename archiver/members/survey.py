"""Turns named checkpoints into the certainty that they make one ensemble: shared, tied, and how large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archiver.source import Source
from archiver.texts.pretrained import adapt_state
from vmap_ensemble.archive.checkpoints import Checkpoint, read_checkpoint
from vmap_ensemble.archive.key_forms import fit_member
from vmap_ensemble.archive.manifest import hash_file
from vmap_ensemble.core.states import (
    State,
    check_finite,
    compare_members,
    find_shared,
    find_ties,
    fit_to_architecture,
    renamed,
    spec_of,
)
from vmap_ensemble.errors import MemberError
from vmap_ensemble.models.architecture import (
    TORCHVISION,
    TRANSFORMERS,
    build_architecture,
    current_key,
    infer_num_classes,
)
from vmap_ensemble.models.construction import check_construction

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
    # Per member what its checkpoint says of its classes, where it does.
    classes: tuple[dict[int, str] | None, ...] = ()
    # Per member what its checkpoint says of how images are prepared, where it does.
    preprocessing: tuple[Mapping[str, Any] | None, ...] = ()

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
    choice: str | None = None,
) -> Survey:
    """Read and check all members against each other and against the architecture.

    Args:
        sources: At least one member.
        architecture: As in `build_architecture`; empty when only the handler knows it.
        num_classes: Width of the last layer; read from the first member when None.
        folder: Where model.py or pretrained/ lies, if the architecture needs one.
        allow_nan: Archive NaN and infinite weights nevertheless.
        step: Called with a line of what is done, once per member and once for the comparison.
        choice: Which weights to take of files that hold several, as in `read_checkpoint`.

    Raises:
        MemberError: One line that names the file, the key, and both shapes or dtypes.
        SettingsError: The architecture can't be built, or draws numbers that stand in no checkpoint.
    """
    labels = _labels(sources)
    read: list[Checkpoint] = []
    hashes: list[str] = []
    for source in sources:
        step(f"read {source.name}")
        read.append(read_checkpoint(source.path, choice))
        hashes.append(hash_file(source.path))
    states = [checkpoint.state for checkpoint in read]
    left_out: list[str] = []
    if architecture:
        check_construction(architecture, num_classes, folder)
        num_classes = num_classes or _count_classes(labels[0], states[0], architecture)
        model = build_architecture(architecture, num_classes, folder)
        states, left_out = fit_members(dict(zip(labels, states, strict=True)), model, architecture)
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
        classes=tuple(checkpoint.classes for checkpoint in read),
        preprocessing=tuple(checkpoint.preprocessing for checkpoint in read),
    )


def _count_classes(label: str, state: State, architecture: str) -> int | None:
    """The width of the last layer, in whatever form the member's keys come; other shapes don't matter here."""
    found: list[int | None] = []

    def count(form: State) -> State:
        own = _current(form, architecture)
        found.append(infer_num_classes(architecture, {key: tuple(tensor.shape) for key, tensor in own.items()}))
        if found[-1] is None:
            raise MemberError(f"{label}: it has no last layer")
        return own

    if not architecture.startswith(TORCHVISION):
        return None
    with suppress(MemberError):  # the comparison with the architecture says what is wrong
        fit_member(label, state, set(), count)
    return next((count for count in reversed(found) if count is not None), None)


def _current(state: State, architecture: str) -> State:
    return renamed(state, lambda key: current_key(architecture, key))


def fit_members(states: dict[str, State], model: nn.Module, architecture: str) -> tuple[list[State], list[str]]:
    """The members with the keys of the architecture, and what any of them has beyond those."""
    known = set(model.state_dict())
    is_encoder, embedding = architecture.startswith(TRANSFORMERS), architecture == f"{TRANSFORMERS}embedding"
    fitted, left_out = [], set()
    for label, state in states.items():
        spare: list[str] = []

        def fit(form: State, label: str = label, spare: list[str] = spare) -> State:
            own = _current(form, architecture)
            extra = [key for key in form if current_key(architecture, key) is None]
            if is_encoder:
                own, extra = adapt_state(own, model, embedding)
            result = fit_to_architecture(label, own, model)
            spare[:] = extra
            return result

        fitted.append(fit_member(label, state, known, fit))
        left_out.update(spare)
    return fitted, sorted(left_out)


def _labels(sources: list[Source]) -> list[str]:
    """What errors call the members: the file's name, with the member's where two files share one."""
    shown = [source.shown for source in sources]
    return [
        source.shown if shown.count(source.shown) == 1 else f"{source.shown} ({source.name})" for source in sources
    ]
