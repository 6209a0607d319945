"""Turns index_to_name.json, and what checkpoints say of their classes, into labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmap_ensemble.errors import MemberError, SettingsError

LABELS_FILE = "index_to_name.json"
EXPECTED = 'expected {"0": "label", …}, {"0": ["id", "label"], …}, {"label": 0, …} or ["label", …]'
# Where checkpoints carry their classes, either way round or as a list; and where these lie in turn.
CLASS_KEYS = (
    *("class_to_idx", "label2id", "label_to_idx", "class_to_index", "label2idx", "cat_to_idx"),
    *("id2label", "idx_to_class", "idx2label", "index_to_class", "idx_to_label", "index_to_name", "idx2class"),
    *("categories", "classes", "class_names", "label_names", "label_list", "classnames"),
)
_AROUND = ("meta", "args", "config", "hparams", "hyper_parameters", "hyperparameters", "model_config", "metadata")
_TEXT_IN_ERRORS = 60


def read_labels(folder: Path) -> dict[int, str] | None:
    """Read index_to_name.json of an archive; None where there is none.

    Raises:
        SettingsError: As `parse_labels`.
    """
    path = folder / LABELS_FILE
    return parse_labels(path.read_bytes(), LABELS_FILE) if path.is_file() else None


def parse_labels(data: bytes, where: str, count: int | None = None) -> dict[int, str]:
    """Class number -> name, of a file's bytes.

    Args:
        data: JSON: {"0": "cat"}, {"0": ["n02123045", "cat"]}, {"cat": 0} or ["cat"]; each also as the value of
            `label_list`, where it may be text, "[cat, dog]", as TorchServe's token classification has it.
        where: What errors call the file.
        count: How many classes the members have; any number when None. Two names go with one logit.

    Raises:
        SettingsError: Another form, numbers that aren't 0 to C-1, a name that is no text, or another count.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: {EXPECTED}; not JSON ({error})") from None
    if isinstance(value, dict) and list(value) == ["label_list"]:
        value = value["label_list"]
        if isinstance(value, str):
            value = [
                name.strip().strip("'\"") for name in value.strip().removeprefix("[").removesuffix("]").split(",")
            ]
    try:
        labels = as_labels(value)
    except ValueError as error:
        raise SettingsError(f"{where}: {EXPECTED}; {error}") from None
    check_count(labels, count, where)
    return labels


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if twice is not None:
        raise ValueError(f"'{_short(twice)}' stands there twice")
    return dict(pairs)


def as_labels(value: Any) -> dict[int, str]:
    """Class number -> name, in the order of the numbers.

    Raises:
        ValueError: What is wrong with it.
    """
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"got {_short(value)}")
    if all(_is_number(item) for item in value.values()) and not all(_is_index(key) for key in value):
        value = _turned(value)
    named = {_index(key): _name(item) for key, item in value.items()}
    if sorted(named) != list(range(len(value))):
        missing = next(index for index in range(len(value)) if index not in named)
        raise ValueError(f"classes are numbered from 0 without gaps, and {missing} is missing")
    return dict(sorted(named.items()))


def _turned(value: Mapping[Any, Any]) -> dict[int, Any]:
    turned = {int(number): name for name, number in value.items()}
    if len(turned) < len(value):
        raise ValueError("two names have one number")
    return turned


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(key: Any) -> bool:
    return _is_number(key) or (isinstance(key, str) and key.isascii() and key.isdigit() and key == str(int(key)))


def _index(key: Any) -> int:
    if not _is_index(key):
        raise ValueError(f"'{_short(key)}' is no class number")
    return int(key)


def _name(value: Any) -> str:
    # TorchServe's lists are [id, name]: the name is what people read.
    if isinstance(value, list | tuple) and value:
        value = value[-1]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a name is {_short(value)}, expected text")
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _TEXT_IN_ERRORS else text[: _TEXT_IN_ERRORS - 1] + "…"


def check_count(labels: Mapping[int, str], count: int | None, where: str) -> None:
    """Refuse labels for another number of classes; one logit speaks of two classes, or of one.

    Raises:
        SettingsError: Both numbers.
    """
    if count is None or len(labels) == count or (count, len(labels)) == (1, 2):
        return
    raise SettingsError(f"{where}: {len(labels)} labels, the members have {count} classes")


def classes_in(loaded: Any, where: str) -> dict[int, str] | None:
    """What a checkpoint says of its classes; None where it says nothing.

    Args:
        loaded: What the file holds.
        where: What errors call it.

    Raises:
        MemberError: It says two different things.
    """
    found: tuple[str, dict[int, str]] | None = None
    for key, value in _claims(loaded):
        try:
            labels = as_labels(value)
        except ValueError:
            continue  # a number of classes, or a setting of that name
        if found is None:
            found = (key, labels)
        elif found[1] != labels:
            raise MemberError(
                f"{where}: {found[0]} and {key} say different things of the classes; save only one of them"
            )
    return found[1] if found else None


def _claims(loaded: Any) -> list[tuple[str, Any]]:
    if isinstance(loaded, argparse.Namespace):
        loaded = vars(loaded)
    if not isinstance(loaded, Mapping):
        return []
    own = [(key, loaded[key]) for key in CLASS_KEYS if isinstance(loaded.get(key), list | tuple | Mapping)]
    return own + [claim for key in _AROUND for claim in _claims(loaded.get(key))]
