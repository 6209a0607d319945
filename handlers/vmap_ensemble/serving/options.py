"""Turns what a request says of its options into Options, and refuses what would be one if it were spelt rightly.

An option that is read past has all members answer what one tenant's were asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.kserve import INPUT_KEYS
from vmap_ensemble.tasks.answers import Options

OPTION_NAMES = ("detail", "subset", "top_k", "target")
OPTION_HEADERS = {
    "x-ensemble-detail": "detail",
    "x-ensemble-subset": "subset",
    "x-ensemble-top-k": "top_k",
    "x-ensemble-target": "target",
}
HEADER_PREFIX = "x-ensemble-"
# Each key is compared with the options' names: a million of them would hold up a batch.
MOST_PARAMETERS = 256
# Of a request's own words so many characters at most are quoted in an error.
SHOWN = 80
# From this likeness on a key is taken for a misspelt one.
MISSPELT = 0.75
# What an option is told that stands where it can't be one item's.
OWN_PLACE = "; options stand in the body, or in its 'parameters'"


def check_keys(given: Mapping[str, Any], known: Sequence[str] | None, where: str, more: str = "") -> None:
    """Refuse unknown keys, naming the nearest known one; where any key may be, only what looks like an option.

    Args:
        given: What is checked.
        known: The keys that may be; None: any.
        where: What an error begins with.
        more: What an error ends with.

    Raises:
        RequestError: 400.
    """
    for key in given:
        near = difflib.get_close_matches(str(key)[:SHOWN], known or OPTION_NAMES, n=1, cutoff=MISSPELT)
        if (known is None and (key in OPTION_NAMES or not near)) or (known is not None and key in known):
            continue
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known or OPTION_NAMES)}"
        raise RequestError(400, f"{where}unknown key '{str(key)[:SHOWN]}'; {hint}{more}")


def _is_like_an_option(key: Any) -> bool:
    return bool(difflib.get_close_matches(str(key)[:SHOWN], OPTION_NAMES, n=1, cutoff=MISSPELT))


def check_headers(plain: Mapping[str, str]) -> None:
    """Refuse headers that would be options if they were spelt rightly.

    Raises:
        RequestError: 400.
    """
    check_keys({key: None for key in plain if key.startswith(HEADER_PREFIX)}, tuple(OPTION_HEADERS), "header: ")


def check_tensors(payload: Mapping[str, Any]) -> None:
    """Refuse options within an input or output of KServe v2: unread, they would have all members answer.

    Raises:
        RequestError: 400.
    """
    for key in ("inputs", "outputs"):
        tensors = payload.get(key)
        for number, tensor in enumerate(tensors if isinstance(tensors, list) else ()):
            if not isinstance(tensor, dict):
                continue
            where = f"{key}[{number}]"
            if key == "inputs":
                check_keys(tensor, INPUT_KEYS, f"{where}: ", OWN_PLACE)
            for holder, given in ((where, tensor), (f"{where}.parameters", tensor.get("parameters"))):
                for name in _checked_parameters(given, holder):
                    if _is_like_an_option(name):
                        raise RequestError(400, f"{holder}: unexpected '{name[:SHOWN]}'{OWN_PLACE}")


def _checked_parameters(parameters: Any, where: str) -> dict[str, Any]:
    """Parameters of KServe, none where they are no object."""
    if not isinstance(parameters, dict):
        return {}
    if len(parameters) > MOST_PARAMETERS:
        raise RequestError(400, f"{where}: expected at most {MOST_PARAMETERS} keys, got {len(parameters)}")
    return parameters


def body_options(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a body: its own keys, and those of KServe's `parameters`, which may hold others' keys, too."""
    parameters = _checked_parameters(payload.get("parameters"), "parameters")
    for key in parameters:
        if key not in OPTION_NAMES and _is_like_an_option(key):
            check_keys({key: None}, OPTION_NAMES, "parameters: ")
    found = {k: parameters[k] for k in OPTION_NAMES if k in parameters}
    return {**found, **{k: payload[k] for k in OPTION_NAMES if k in payload}}


def read_options(raw: Mapping[str, Any]) -> Options:
    """Options by name, as a header, a field or JSON has them.

    Raises:
        RequestError: 400 for a value that means nothing.
    """
    return Options(
        detail=_read_detail(raw.get("detail")),
        subset=_read_subset(raw.get("subset")),
        top_k=_read_top_k(raw.get("top_k")),
        target=_read_target(raw.get("target")),
    )


def _read_detail(value: Any) -> bool:
    value = as_text(value)
    if value in (None, "", False, "none", "false"):
        return False
    if value in (True, "members"):
        return True
    raise RequestError(400, "detail: expected 'members' or nothing")


def _read_subset(value: Any) -> tuple[str, ...] | None:
    value = as_text(value)
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise RequestError(400, "subset: expected names of members, separated by commas or as a list")
    cleaned = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not cleaned:
        raise RequestError(400, "subset: expected at least one name of a member")
    return cleaned


def _read_top_k(value: Any) -> int | None:
    value = as_text(value)
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(400, "top_k: expected a whole number of at least 1")
    return value


def _read_target(value: Any) -> tuple[str | int, ...] | None:
    value = as_text(value)
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        raise RequestError(400, "target: expected labels or numbers, separated by commas or as a list, or 'all'")
    return tuple(dict.fromkeys(names))


def as_text(value: Any) -> Any:
    """Bytes as the UTF-8 that they are; anything else as it is."""
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return bytes(value)
    return value
