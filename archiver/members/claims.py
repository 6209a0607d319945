"""Turns what members say of their classes and their preprocessing into one setting and one file that all agree on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archiver.source import Source
from vmap_ensemble.archive.labels import check_count, parse_labels
from vmap_ensemble.errors import ArchiveError, SettingsError
from vmap_ensemble.models.architecture import (
    TORCHVISION,
    TRANSFORM_INPUT,
    WITH_AUXILIARY_HEADS,
    torchvision_name,
)

Labels = dict[int, str]


def named_weights(sources: Sequence[Source]) -> dict[str, Any]:
    """Member -> the entry of torchvision's weights that it was named by."""
    import torchvision  # here: slow to import, and most archives don't need it

    return {item.name: torchvision.models.get_weight(item.weights) for item in sources if item.weights}


def claimed_transforms(sources: Sequence[Source]) -> str | None:
    """The weights whose transform all members named by torchvision's weights want; None where none is named so.

    Raises:
        ArchiveError: Two members want different ones.
    """
    if not any(source.weights for source in sources):
        return None
    (first, expected), *others = named_weights(sources).items()
    for name, entry in others:
        if repr(entry.transforms()) != repr(expected.transforms()):
            raise ArchiveError(
                f"member '{name}': {entry} wants other transforms than '{first}' ({expected}): "
                f"{_difference(expected.transforms(), entry.transforms())}; one image is prepared once for all. "
                "The key 'transforms' names the weights whose transforms all are to get"
            )
    return str(expected)


def _difference(expected: Any, got: Any) -> str:
    ours, theirs = vars(expected), vars(got)
    keys = [key for key in theirs if str(theirs[key]) != str(ours.get(key)) and not key.startswith("_")]
    return ", ".join(f"{key} {theirs[key]} instead of {ours.get(key)}" for key in keys) or "another kind of transform"


def claimed_architecture(architecture: str, sources: Sequence[Source]) -> str:
    """The architecture with the option that torchvision sets when it loads its weights of GoogLeNet and Inception.

    Raises:
        ArchiveError: Some members were named by such weights and others weren't.
    """
    if not architecture.startswith(TORCHVISION) or torchvision_name(architecture) not in WITH_AUXILIARY_HEADS:
        return architecture
    named = [source for source in sources if source.weights]
    if not named or architecture.endswith(f":{TRANSFORM_INPUT}"):
        return architecture
    if len(named) < len(sources):
        raise ArchiveError(
            f"member '{named[0].name}': torchvision's own weights take images that the network rescales; whether the "
            f'other members do, their files don\'t say. If so: "architecture": "{architecture}:{TRANSFORM_INPUT}"'
        )
    return f"{architecture}:{TRANSFORM_INPUT}"


def note_on_input(architecture: str) -> str | None:
    """What can't be read from a checkpoint of GoogLeNet or Inception, for a person to decide."""
    if not architecture.startswith(TORCHVISION) or torchvision_name(architecture) not in WITH_AUXILIARY_HEADS:
        return None
    if architecture.endswith(f":{TRANSFORM_INPUT}"):
        return None
    return (
        f"{TRANSFORM_INPUT} is off, as for members trained from scratch; those fine-tuned from torchvision's weights "
        f'want "architecture": "{architecture}:{TRANSFORM_INPUT}"'
    )


def claimed_classes(sources: Sequence[Source], classes: Sequence[Labels | None], count: int | None) -> Labels | None:
    """The classes that members' checkpoints speak of, torchvision's own weights included; None where none does.

    Args:
        sources: The members.
        classes: What each file says.
        count: How many classes the members have, where that is known.

    Raises:
        ArchiveError: Two members say different things, or another number of classes.
    """
    entries = named_weights(sources) if any(source.weights for source in sources) else {}
    said = dict(zip([source.name for source in sources], classes, strict=True))
    for name, entry in entries.items():
        said[name] = said[name] or dict(enumerate(entry.meta["categories"]))
    found = {name: labels for name, labels in said.items() if labels}
    if not found:
        return None
    (first, expected), *others = found.items()
    for name, labels in others:
        if labels != expected:
            raise ArchiveError(f"member '{name}': its classes are not those of '{first}': {_first(expected, labels)}")
    try:
        check_count(expected, count, f"member '{first}': its checkpoint")
    except SettingsError as error:
        raise ArchiveError(f"{error}; give the right ones in the key 'labels'") from None
    # torchvision's own categories come with its transforms.
    return expected if any(classes) else None


def _first(expected: Labels, got: Labels) -> str:
    index = next(i for i in range(max(len(expected), len(got))) if expected.get(i) != got.get(i))
    return f"{index} is {got.get(index, 'absent')!r}, there {expected.get(index, 'absent')!r}"


def stage_labels(path: Path | None, claimed: Labels | None, count: int | None, folder: Path) -> Path | None:
    """The index_to_name.json that goes into the archive: the block's, checked, or what the members say.

    Args:
        path: The block's file, if there is one.
        claimed: What `claimed_classes` found.
        count: How many classes the members have, where that is known.
        folder: Where a file is written to.

    Raises:
        SettingsError: The block's file is of no known form, or for another number of classes.
    """
    labels = parse_labels(path.read_bytes(), path.name, count) if path is not None else claimed
    if labels is None:
        return None
    if path is not None and _is_plain(path):
        return path
    staged = folder / "labels.json"
    rows: Mapping[str, str] = {str(index): name for index, name in labels.items()}
    staged.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return staged


def count_outputs(model: nn.Module, shape: Sequence[int] | None) -> int | None:
    """How many classes a network of one's own has, as one input tells; None where it gives no (1, classes)."""
    if shape is None:
        return None
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, *shape))
    except Exception:  # the network is the user's, its weights are not filled, and its handler may prepare inputs
        return None
    return int(output.shape[1]) if isinstance(output, Tensor) and output.dim() == 2 else None


def _is_plain(path: Path) -> bool:
    """Whether a file is in the form that an archive has: numbers as keys."""
    value = json.loads(path.read_bytes())
    return isinstance(value, dict) and all(key.isdigit() for key in value)
