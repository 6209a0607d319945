"""Turns a checkpoint file into a plain state dict, and state dicts into the certainty that they stack.

Nothing here executes what a file holds: pickles are read with `weights_only=True`, always.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vmap_ensemble.core.states import State
from vmap_ensemble.errors import MemberError, first_line

logger = logging.getLogger(__name__)


PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
WRAPPERS = ("state_dict", "model", "model_state_dict")
# DataParallel and torch.compile put these before every key.
PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path) -> State:
    """Read one checkpoint as a flat state dict on the CPU, memory-mapped.

    Args:
        path: A .pt, .pth or .bin file of torch.save, or a .safetensors file. A dict wrapped as
            {"state_dict": ...}, {"model": ...} or {"model_state_dict": ...} is unwrapped; a prefix
            "module." (DataParallel) or "_orig_mod." (torch.compile) that all keys carry is removed.

    Returns:
        Key -> tensor. Aliased tensors (tied weights) stay aliased. The tensors are views of the file: they
        are read when used, and the file must not change meanwhile.

    Raises:
        MemberError: The file is missing, unreadable, not a state dict, or needs more than weights.

    Note:
        Files in torch's format from before 1.6 can't be mapped; they are read whole, and the log says so.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise MemberError(f"{path.name}: expected a file ending in {', '.join(SUFFIXES)}, got '{path.suffix}'")
    if not path.is_file():
        raise MemberError(f"{path.name}: no such file")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _strip_prefixes(_unwrap(loaded, path.name))
    _require_tensors(state, path.name)
    return state


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise MemberError(f"{path.name}: not a whole safetensors file ({error})") from None


def _read_pickle(path: Path) -> Any:
    mapped = _is_zip(path)
    if not mapped:
        logger.info("%s: format from before torch 1.6, which can't be memory-mapped; reading it whole", path.name)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise MemberError(
            f"{path.name}: holds more than weights, or is no checkpoint; only tensors are read "
            "(weights_only=True). Save it again with torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise MemberError(f"{path.name}: not a whole torch checkpoint ({first_line(error)})") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unwrap(loaded: Any, where: str) -> Any:
    """Follow {"state_dict": {...}} and its kin down to the dict of tensors."""
    while isinstance(loaded, Mapping):
        inner = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            return loaded
        if len(inner) > 1:
            raise MemberError(f"{where}: holds several state dicts ({', '.join(inner)}); save only one of them")
        loaded = loaded[inner[0]]
    return loaded


def _strip_prefixes(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    state = dict(state)
    for prefix in PREFIXES * 2:
        if state and all(str(key).startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _require_tensors(state: Any, where: str) -> None:
    if not isinstance(state, Mapping):
        raise MemberError(f"{where}: expected a state dict (name -> tensor), got {type(state).__name__}")
    if not state:
        raise MemberError(f"{where}: the state dict is empty")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise MemberError(
                f"{where}: key '{key}' is {type(value).__name__}, expected a tensor; "
                f"a state dict may be wrapped only as {', '.join(WRAPPERS)}"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise MemberError(f"{where}: key '{key}' is sparse or quantised; expected a dense tensor")
