"""Turns what members say of how their images are prepared into the settings of the archive, where all of them agree.

beside a member        preprocessing.json (our five keys), preprocessor_config.json (transformers), config.json (timm)
inside a checkpoint    an entry `preprocessing` of the same forms
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from archiver.source import Source
from vmap_ensemble.errors import ArchiveError, first_line
from vmap_ensemble.tasks.images.settings import PREPARATION as KEYS

# The file's name -> what its contents must hold to be of that form.
FILES = {"preprocessing.json": None, "preprocessor_config.json": "image_mean", "config.json": "pretrained_cfg"}
# Pillow's numbers of its filters, which transformers writes.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def claimed_preprocessing(
    sources: Sequence[Source], said: Sequence[Mapping[str, Any] | None], decided: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that members' files speak of; empty where none does.

    Args:
        sources: The members.
        said: Per member the entry `preprocessing` of its checkpoint.
        decided: Settings that the block gives: what members say of them doesn't matter.

    Raises:
        ArchiveError: Two members say different things, or one says what can't be had.
    """
    found: dict[str, dict[str, Any]] = {}
    if set(KEYS) <= set(decided):
        return {}
    for source, entry in zip(sources, said, strict=True):
        told = read_form(entry, f"member '{source.name}': preprocessing") if entry else _beside(source)
        if told:
            found[source.name] = {key: value for key, value in told.items() if key not in decided}
    if not found:
        return {}
    (first, expected), *others = found.items()
    for name, told in others:
        if told != expected:
            key = next(key for key in KEYS if told.get(key) != expected.get(key))
            raise ArchiveError(
                f"member '{name}': its preprocessing is not that of '{first}': {key} {told.get(key)} instead of "
                f"{expected.get(key)}; one image is prepared once for all. The settings {', '.join(KEYS)} say which"
            )
    return expected


def _beside(source: Source) -> dict[str, Any] | None:
    folder = source.path.parent
    for name, mark in FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if mark is not None:  # somebody else's file
                continue
            raise ArchiveError(f"{name} beside member '{source.name}': expected JSON ({first_line(error)})") from None
        if mark is None or (isinstance(values, dict) and mark in values):
            return read_form(values, f"{name} beside member '{source.name}'")
    return None


def read_form(values: Any, where: str) -> dict[str, Any]:
    """One of the known forms as our settings.

    Args:
        values: What a file or an entry holds.
        where: What errors call it.

    Raises:
        ArchiveError: It is of no known form, or asks for what the handler can't do.
    """
    try:
        if not isinstance(values, Mapping):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        if isinstance(values.get("pretrained_cfg"), Mapping):
            told = _of_timm(values["pretrained_cfg"])
        elif "image_mean" in values:
            told = _of_transformers(values)
        else:
            told = _of_ours(values)
        _check(told)
        return told
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else first_line(error)
        raise ArchiveError(f"{where}: {reason}") from None


def _check(told: Mapping[str, Any]) -> None:
    for key in ("mean", "std"):
        values = told.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != 3):
            raise ValueError(f"{key}: expected red, green and blue, got {values}")
    interpolation = told.get("interpolation", "bilinear")
    if interpolation not in FILTERS.values():
        raise ValueError(f"interpolation: expected one of {', '.join(FILTERS.values())}, got {interpolation!r}")


def _of_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our own names, or those of torchvision's presets."""
    names = {"resize_size": "resize", "crop_size": "crop"}
    own = {names.get(key, key): value for key, value in values.items()}
    if own.pop("antialias", True) is False:
        raise ValueError("antialias false can't be had")
    unknown = sorted(set(own) - set(KEYS))
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]}'; expected {', '.join(KEYS)}")
    return {key: _plain(own[key]) for key in KEYS if own.get(key) is not None}


def _of_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """timm cuts `crop_pct` of what it resizes to, out of the middle; its own defaults stand for what isn't said.

    Source: timm/data/config.py, timm/data/constants.py.
    """
    if values.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode '{values['crop_mode']}' can't be had; expected 'center'")
    height, width = (int(side) for side in values["input_size"][1:])
    if height != width:
        raise ValueError(
            f"input_size {height}x{width}: timm resizes to other sides than can be had; expected a square"
        )
    return {
        "resize": math.floor(height / float(values.get("crop_pct") or 0.875)),
        "crop": [height, width],
        "mean": _plain(values["mean"]),
        "std": _plain(values["std"]),
        "interpolation": str(values.get("interpolation") or "bicubic"),
    }


def _of_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an image processor of transformers does: resize, crop, divide by 255, normalise."""
    if values.get("do_resize") is False or values.get("do_rescale") is False:
        raise ValueError("do_resize and do_rescale can't be left out")
    if abs(float(values.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3:
        raise ValueError(f"rescale_factor {values['rescale_factor']} can't be had; expected 1/255")
    resize, crop = _sizes(values)
    normal = values.get("do_normalize", True)
    return {
        "resize": resize,
        "crop": crop,
        "mean": _plain(values["image_mean"]) if normal else [0.0] * 3,
        "std": _plain(values["image_std"]) if normal else [1.0] * 3,
        "interpolation": FILTERS[int(values.get("resample", 2))],
    }


def _sizes(values: Mapping[str, Any]) -> tuple[Any, list[int]]:
    size = values["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if values.get("do_center_crop") else {"height": size, "width": size}
    if "shortest_edge" not in size:
        resize = [int(size["height"]), int(size["width"])]
        return resize, _crop(values, resize)
    edge = int(size["shortest_edge"])
    if "crop_pct" in values:  # ConvNeXt: below 384 pixels it resizes to more, and cuts the edge out
        return (int(edge / values["crop_pct"]), [edge, edge]) if edge < 384 else ([edge, edge], [edge, edge])
    if not values.get("do_center_crop"):
        raise ValueError("shortest_edge without do_center_crop gives images of many shapes")
    return edge, _crop(values, [edge, edge])


def _crop(values: Mapping[str, Any], default: list[int]) -> list[int]:
    crop = values.get("crop_size") if values.get("do_center_crop") else None
    if crop is None:
        return default
    return [crop, crop] if isinstance(crop, int) else [int(crop["height"]), int(crop["width"])]


def _plain(value: Any) -> Any:
    """Tuples, which JSON doesn't have, as lists."""
    return list(value) if isinstance(value, tuple) else value
