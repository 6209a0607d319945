"""Turns what training frameworks put around a state dict into the state dict: entries of a file, parts of keys.

Weights are never picked in silence where a file holds two sets of them: averages beside the raw ones, a teacher
beside its student.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from vmap_ensemble.core.states import State, renamed, same_bits
from vmap_ensemble.errors import MemberError

WRAPPERS = ("state_dict", "model", "model_state_dict")
# Parts of keys that only torch.compile, FSDP and activation checkpointing write.
_COMPILED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = "module."
# torch.optim.swa_utils.AveragedModel's counter.
_AVERAGED = "n_averaged"
_DEEPEST = 5
# Words in the name of an entry that make it averaged weights wherever it lies; what else an optimiser keeps has the
# parameters' shapes, too.
_AVERAGES = {"ema", "shadow", "swa", "averaged", "average"}


def choose_state(loaded: Any, where: str, choice: str | None) -> tuple[Any, str | None]:
    """Follow {"state_dict": {...}} and its kin down to the dict of tensors.

    Args:
        loaded: What the file holds.
        where: What errors call it.
        choice: As in `read_checkpoint`.

    Returns:
        The dict, unchecked, and `choice` where no entry is called that, which then means a submodule.

    Raises:
        MemberError: Several sets of weights and no choice, or a choice that fits several.
    """
    if not isinstance(loaded, Mapping):
        return loaded, choice
    entries = dict(_entries(loaded))
    if choice is not None:
        named = _named(entries, choice, where)
        return (_follow(loaded, where, entries)[1], choice) if named is None else (named, None)
    path, main = _follow(loaded, where, entries)
    rivals = [name for name, entry in entries.items() if name != path and _is_rival(main, entry)]
    if rivals:
        raise _several(where, [path or "the file's own", *rivals])
    return main, None


def _several(where: str, names: Sequence[str]) -> MemberError:
    return MemberError(
        f"{where}: holds several state dicts ({', '.join(names)}); say which one is meant: --weights NAME, or the "
        "key 'checkpoint_weights', or save only one of them"
    )


def _entries(value: Any, path: str = "", depth: int = 0, counts: bool = True) -> Iterator[tuple[str, Any]]:
    """Dotted path -> every dict or list below the top that holds weights; of an optimiser's, averages alone.

    Args:
        value: What is looked into.
        path: Where it lies.
        depth: How deep.
        counts: Whether what is found are weights; else only what is called an average.
    """
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        counts = counts and "param_groups" not in value
        found = bool(path) and any(_is_weight(item) for item in value.values())
        parts = [(key, item) for key, item in value.items() if isinstance(key, str)]
    elif isinstance(value, list | tuple):
        found = len(value) > 1 and all(_is_weight(item) for item in value)
        parts = [(str(index), item) for index, item in enumerate(value) if isinstance(item, Mapping)]
    else:
        return
    if found and counts:
        yield path, value
    for key, item in parts:
        is_average = bool(_AVERAGES & set(re.split(r"[._]", key.lower())))
        below = is_average or (counts and "optim" not in key.lower())
        yield from _entries(item, f"{path}.{key}" if path else key, depth + 1, below)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _follow(loaded: Mapping[str, Any], where: str, entries: Mapping[str, Any]) -> tuple[str, Any]:
    """The path of the main state dict, and itself; the top's path is empty."""
    path, value = "", loaded
    while isinstance(value, Mapping):
        inside = [key for key in WRAPPERS if isinstance(value.get(key), Mapping)]
        if len(inside) > 1:
            inside = [key for key in inside if _holds(entries, path, key)]
        if not inside and not any(_is_weight(item) for item in value.values()):
            inside = [
                key for key, item in value.items() if isinstance(item, Mapping) and _holds(entries, path, str(key))
            ]
        if not inside:
            break
        if len(inside) > 1:
            raise _several(where, [f"{path}.{key}" if path else key for key in inside])
        path, value = f"{path}.{inside[0]}" if path else inside[0], value[inside[0]]
    return path, value


def _holds(entries: Mapping[str, Any], path: str, key: str) -> bool:
    full = f"{path}.{key}" if path else key
    return any(
        isinstance(entry, Mapping) and (name == full or name.startswith(f"{full}."))
        for name, entry in entries.items()
    )


def _named(entries: Mapping[str, Any], choice: str, where: str) -> Any:
    """The entry that a choice means; None where it means none."""
    exact = [name for name in entries if name == choice or name.rpartition(".")[2] == choice]
    inside = [name for name in entries if f".{choice}." in f".{name}"]
    alike = [name for name in entries if choice.lower() in re.split(r"[._]", name.lower())]
    found = exact or inside or alike
    if len(found) > 1:
        raise MemberError(f"{where}: --weights {choice} fits {', '.join(found)}; give one of them in full")
    if not found:
        return None
    entry = entries[found[0]]
    if not isinstance(entry, Mapping):
        raise MemberError(
            f"{where}: {found[0]} is a list of tensors without names, as torch_ema saves them; load it where you "
            "trained, copy it into the model and save model.state_dict()"
        )
    return entry


def _is_rival(main: Any, entry: Any) -> bool:
    """Whether an entry is weights of the same network: most of its keys and shapes, or a list of such shapes."""
    if not isinstance(main, Mapping):
        return False
    ours = {_plain(key, main): value for key, value in main.items() if isinstance(value, Tensor)}
    if not isinstance(entry, Mapping):
        shapes = [tuple(value.shape) for value in ours.values()]
        return len(entry) > 1 and 2 * sum(tuple(item.shape) in shapes for item in entry) >= len(shapes)
    theirs = {_plain(key, entry): value for key, value in entry.items() if isinstance(value, Tensor)}
    common = [key for key in theirs if key in ours and theirs[key].shape == ours[key].shape]
    if 2 * len(common) < len(theirs) or len(common) < min(2, len(ours)):
        return False
    return not all(same_bits(ours[key], theirs[key]) for key in common)


def _plain(key: Any, keys: Mapping[Any, Any]) -> str:
    """A key as averages call it: without wrappers and what all keys begin with; some leave the dots out."""
    parts = [part for part in str(key).split(".") if part not in (*_COMPILED, "module")]
    return "".join(parts[_common_depth(tuple(map(str, keys))) :])


def _common_depth(keys: tuple[str, ...]) -> int:
    """How many parts all keys begin with, wrappers and the counter of an average left out."""
    split = [
        [part for part in key.split(".") if part not in (*_COMPILED, "module")] for key in keys if key != _AVERAGED
    ]
    depth = 0
    while split and all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    return depth


def strip_wrappers(state: Mapping[str, Tensor], where: str) -> State:
    """Remove what compiling, parallel training and averaging wrote into the keys.

    Raises:
        MemberError: Two keys become one.
    """
    if _AVERAGED in state and all(key.startswith(_PARALLEL) for key in state if key != _AVERAGED):
        state = renamed(state, lambda key: None if key == _AVERAGED else key)
    try:
        state = renamed(state, lambda key: ".".join(part for part in key.split(".") if part not in _COMPILED))
        while state and all(key.startswith(_PARALLEL) and key != _PARALLEL for key in state):
            state = renamed(state, lambda key: key.removeprefix(_PARALLEL))
    except MemberError as error:
        raise MemberError(f"{where}: without what torch.compile put into keys, {error}") from None
    return state


def choose_submodule(state: State, where: str, choice: str) -> State:
    """The weights below `choice` + "."; `ema` also means the one submodule that has it in its name.

    Raises:
        MemberError: There is none, or several are alike.
    """
    parts = list(dict.fromkeys(key.partition(".")[0] for key in state))
    alike = [part for part in parts if choice.lower() in re.split(r"[._]", part.lower())]
    prefix = f"{choice}."
    if not any(key.startswith(prefix) for key in state) and len(alike) == 1:
        prefix = f"{alike[0]}."
    chosen = renamed(state, lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    if not chosen:
        few = ", ".join(parts[:6]) + (" …" if len(parts) > 6 else "")
        raise MemberError(
            f"{where}: --weights {choice}: no entry and no submodule of that name; its keys begin with {few}"
        )
    return strip_wrappers(chosen, where)
