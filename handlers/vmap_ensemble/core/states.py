"""Turns state dicts into the certainty that they are of one architecture: specs, ties, what is shared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmap_ensemble.errors import MemberError

State = dict[str, Tensor]
Spec = tuple[tuple[int, ...], torch.dtype]
# Checkpoints older than torch 0.4.1 lack this counter; load_state_dict fills it with 0 too
# (torch/nn/modules/batchnorm.py, _load_from_state_dict), and evaluation never reads it.
IMPLIED_SUFFIX = "num_batches_tracked"


# Where torch keeps the versions of a state dict's modules, which load hooks read (Module.load_state_dict).
METADATA = "_metadata"


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
        MemberError: A key is missing or unexpected, or a shape or the kind of a dtype is another; or the
            architecture has state that is no tensor.
    """
    check_extra_state(model)
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


def check_extra_state(model: nn.Module) -> None:
    """Refuse modules with a `get_extra_state` of their own: what it returns can't be stacked.

    Raises:
        MemberError: Names the module.
    """
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise MemberError(
                f"{type(model).__name__}: '{name or type(module).__name__}' keeps state in get_extra_state, which "
                "can't be stacked; expected parameters and buffers alone: register it as a buffer"
            )


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
    """The state dict with every key of the architecture: what `load_state_dict` would make of it.

    Keys that the architecture ties are joined, implied ones filled, counters that became floating point are
    whole numbers again. Load hooks of the architecture run, in a copy of it, as torch runs them.

    Args:
        label: What errors call the member.
        state: Key -> tensor of one member.
        model: The architecture.

    Returns:
        A dict in the architecture's order of keys; keys that the architecture ties hold one tensor object.

    Raises:
        MemberError: As `check_architecture`, or two keys that the architecture ties hold different values.
    """
    check_extra_state(model)
    state = _as_copied(state, model)
    loaded = _load_as_torch(state, model) if _has_load_hooks(model) else None
    return _fit(label, state if loaded is None else loaded, model)


def _fit(label: str, state: State, model: nn.Module) -> State:
    check_architecture(label, spec_of(state), model)
    filled = _fill(state, model)
    for first, *others in tied_groups(model):
        for key in others:
            if not same_bits(filled[first], filled[key]):
                raise MemberError(
                    f"{label}: '{first}' and '{key}' differ, but {type(model).__name__} ties them; "
                    "they must hold the same values"
                )
            filled[key] = filled[first]
    return {key: filled[key] for key in model.state_dict()}


def _fill(state: State, model: nn.Module) -> State:
    """With the keys that may be absent; metadata stays."""
    filled = renamed(state, lambda key: key)
    for key, tied_to in _absent_but_implied(state, model).items():
        filled[key] = torch.zeros((), dtype=torch.int64) if tied_to is None else state[tied_to]
    return filled


def _as_copied(state: State, model: nn.Module) -> State:
    """Integers and single numbers as the architecture has them, as copying into it would make them.

    An average or a cast of the model turns integers into floats; a counter of batches may be fractional after an
    average: load_state_dict cuts it, and evaluation never reads it. torch 0.3 saved single numbers as vectors of one.
    """
    expected = model.state_dict()
    cast = renamed(state, lambda key: key)
    for key, given in state.items():
        own, tensor = expected.get(key), given
        if own is not None and own.dim() == 0 and given.shape == (1,):
            cast[key] = tensor = given[0]
        if own is None or own.is_floating_point() or own.dtype == tensor.dtype or tensor.is_complex():
            continue
        is_counter = key.rpartition(".")[2] == IMPLIED_SUFFIX
        if not tensor.is_floating_point() or (is_counter or bool((tensor == tensor.trunc()).all())):
            cast[key] = tensor.to(own.dtype)
    return cast


def _has_load_hooks(model: nn.Module) -> bool:
    """Whether a module of the architecture changes what it loads; torch's own only fill in the batch counter."""
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return True
    for module in model.modules():
        own = type(module)._load_from_state_dict
        foreign = own is not nn.Module._load_from_state_dict and not own.__module__.startswith("torch.nn.")
        if foreign or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
            return True
    return False


def _load_as_torch(state: State, model: nn.Module) -> State | None:
    """What the architecture holds after load_state_dict(strict=True); None where it refuses.

    Tensors are assigned, not copied: members stay mapped from their files, and keep their dtypes.
    """
    try:
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(_fill(state, model), strict=True, assign=True)
        return dict(loaded.state_dict())
    except Exception:  # a hook of a user's own module may raise anything; the caller has the line that says why
        return None


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> State:
    """The state dict under other keys; the versions of its modules, where torch saved them, come along.

    Args:
        state: Key -> tensor.
        rename: Key -> its new name; None leaves it out.

    Raises:
        MemberError: Two keys get one name.
    """
    result: State = OrderedDict()
    for key, tensor in state.items():
        name = rename(key)
        if name is None:
            continue
        if name in result:
            raise MemberError(f"two keys become '{name}', one of them is '{key}'")
        result[name] = tensor
    versions = getattr(state, METADATA, None)
    if isinstance(versions, Mapping):
        moved = {rename(f"{path}.{METADATA}" if path else METADATA): value for path, value in versions.items()}
        kept = {n.removesuffix(METADATA).rstrip("."): value for n, value in moved.items() if n is not None}
        setattr(result, METADATA, OrderedDict(kept))
    return result


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
