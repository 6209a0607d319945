"""Turns a checkpoint file into a plain state dict, and state dicts into the certainty that they stack.

Nothing here executes what a file holds: pickles are read with `weights_only=True`, always.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vmap_ensemble.errors import MemberError, first_line

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
Spec = tuple[tuple[int, ...], torch.dtype]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
WRAPPERS = ("state_dict", "model", "model_state_dict")
# DataParallel and torch.compile put these before every key.
PREFIXES = ("module.", "_orig_mod.")
# Checkpoints older than torch 0.4.1 lack this counter; load_state_dict fills it with 0 too
# (torch/nn/modules/batchnorm.py, _load_from_state_dict), and evaluation never reads it.
IMPLIED_SUFFIX = "num_batches_tracked"


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


def spec_of(state: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Key -> (shape, dtype)."""
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}


def show_spec(spec: Spec) -> str:
    """One spec for an error message: `(64, 10) float32`."""
    return f"{spec[0]} {str(spec[1]).removeprefix('torch.')}"


def compare_members(specs: Mapping[str, Mapping[str, Spec]]) -> None:
    """Refuse members that wouldn't stack.

    Args:
        specs: Label of the file -> key -> (shape, dtype); the first one is what the others must equal.

    Raises:
        MemberError: No members, or one that differs in its keys, a shape or a dtype.
    """
    if not specs:
        raise MemberError("no members: expected at least one checkpoint")
    (first, expected), *others = specs.items()
    for label, got in others:
        for key in expected:
            if key not in got:
                raise MemberError(f"{label}: key '{key}' is missing; {first} has it, {show_spec(expected[key])}")
        for key in got:
            if key not in expected:
                raise MemberError(f"{label}: key '{key}' is not in {first}; it is {show_spec(got[key])}")
            if got[key] != expected[key]:
                raise MemberError(
                    f"{label}: key '{key}' is {show_spec(got[key])}, in {first} it is "
                    f"{show_spec(expected[key])}; all members must have the same shapes and dtypes"
                )


def check_architecture(label: str, spec: Mapping[str, Spec], model: nn.Module) -> None:
    """Refuse a member that doesn't fill the architecture exactly.

    Keys that the architecture ties to a present one, and `num_batches_tracked`, may be absent. Floating
    point types may differ (they are cast when loading), integers and floats may not.

    Args:
        label: What errors call the member.
        spec: Key -> (shape, dtype) of the member.
        model: The architecture.

    Raises:
        MemberError: A key is missing or unexpected, or a shape or the kind of a dtype is another.
    """
    expected = spec_of(model.state_dict())
    name = type(model).__name__
    absent = set(_absent_but_implied(spec, model))
    for key in expected:
        if key not in spec and key not in absent:
            raise MemberError(f"{label}: key '{key}' is missing; {name} expects {show_spec(expected[key])}")
    for key, got in spec.items():
        if key not in expected:
            raise MemberError(f"{label}: key '{key}' ({show_spec(got)}) is unknown to {name}")
        same_kind = got[1].is_floating_point == expected[key][1].is_floating_point
        if got[0] != expected[key][0] or not same_kind:
            raise MemberError(f"{label}: key '{key}' is {show_spec(got)}, {name} expects {show_spec(expected[key])}")


def _absent_but_implied(present: Iterable[str], model: nn.Module) -> dict[str, str | None]:
    """Keys that a checkpoint may lack -> the present key it is tied to, or None for a batch counter."""
    have = set(present)
    implied: dict[str, str | None] = {}
    for group in tied_groups(model):
        held = [key for key in group if key in have]
        if held:
            implied.update({key: held[0] for key in group if key not in have})
    for key in model.state_dict():
        if key not in have and key.rpartition(".")[2] == IMPLIED_SUFFIX:
            implied[key] = None
    return implied


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Keys of the state dict that name one and the same tensor of the model."""
    groups: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def fit_to_architecture(label: str, state: State, model: nn.Module) -> State:
    """The state dict with every key of the architecture: ties joined, implied keys filled.

    Args:
        label: What errors call the member.
        state: Key -> tensor of one member.
        model: The architecture.

    Returns:
        A dict in the architecture's order of keys; keys that the architecture ties hold one tensor object.

    Raises:
        MemberError: As `check_architecture`, or two keys that the architecture ties hold different values.
    """
    check_architecture(label, spec_of(state), model)
    filled = dict(state)
    for key, tied_to in _absent_but_implied(state, model).items():
        filled[key] = torch.zeros((), dtype=torch.int64) if tied_to is None else state[tied_to]
    for first, *others in tied_groups(model):
        for key in others:
            if not same_bits(filled[first], filled[key]):
                raise MemberError(
                    f"{label}: '{first}' and '{key}' differ, but {type(model).__name__} ties them; "
                    "they must hold the same values"
                )
            filled[key] = filled[first]
    return {key: filled[key] for key in model.state_dict()}


def check_finite(label: str, state: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite values.

    Raises:
        MemberError: Names the first such key and how many of its values are bad.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise MemberError(
                f"{label}: key '{key}' holds {bad} NaN or infinite values of {tensor.numel()}; "
                "--allow-nan archives it nevertheless"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; NaN equals NaN, 0 is not -0."""
    if a is b:
        return True
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes_of(a), _bytes_of(b))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def find_ties(states: Iterable[Mapping[str, Tensor]]) -> dict[str, str]:
    """Keys that are one tensor under two names, in every member.

    Args:
        states: The members' state dicts, aliasing kept.

    Returns:
        Tied key -> the key that stands for it. Views of one storage that differ in offset, shape or
        stride are no ties.
    """
    identities: dict[str, list[tuple[Any, ...]]] = {}
    for state in states:
        for key, tensor in state.items():
            identities.setdefault(key, []).append(_identity(key, tensor))
    kept: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for key, identity in identities.items():
        first = kept.setdefault(tuple(identity), key)
        if first != key:
            ties[key] = first
    return ties


def _identity(key: str, tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0 or tensor.device.type == "meta":
        # An empty tensor has no storage of its own to recognise it by.
        return (key,)
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def find_shared(states: list[Mapping[str, Tensor]]) -> list[str]:
    """Keys whose bytes are the same in all members; none when there is only one member."""
    if len(states) < 2:
        return []
    first, *others = states
    return [key for key in first if all(same_bits(first[key], other[key]) for other in others)]
