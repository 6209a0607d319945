"""Turns two constructions of an architecture into the certainty that nothing beside its weights is drawn anew."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmap_ensemble.core.states import same_bits
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import build_plainly, is_own_class

_MODULE_ITSELF = ("_parameters", "_buffers", "_modules", "training")


def check_construction(spec: str, num_classes: int | None, folder: Path | None) -> None:
    """Refuse a class of one's own that draws random numbers which stand in no checkpoint.

    A worker builds the class anew, so what `__init__` draws beside parameters (buffers that aren't persistent,
    permutations) would be other numbers than those that the members were trained with. Drawn after a seed of its own,
    they are the same, and fine.

    Args:
        spec: As in `build_architecture`.
        num_classes: As there.
        folder: As there.

    Raises:
        SettingsError: Names what differs between two constructions.
    """
    if not is_own_class(spec):
        return
    models = []
    for seed in (1, 2):
        with _seeded(seed):
            models.append(build_plainly(spec, num_classes, folder))
    for (name, first), (_, second) in zip(models[0].named_modules(), models[1].named_modules(), strict=False):
        for key, value in _beside_weights(first).items():
            if not _same(value, _beside_weights(second).get(key)):
                where = f"{name}.{key}" if name else key
                raise SettingsError(
                    f"architecture '{spec}': '{where}' is drawn at random and is in no checkpoint, so members would "
                    "run with other numbers than they were trained with; make it a persistent buffer "
                    "(register_buffer), or set a seed where it is drawn"
                )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Other random numbers of torch, numpy and Python inside; theirs go on as before afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _beside_weights(module: nn.Module) -> Mapping[str, Any]:
    plain = {key: value for key, value in vars(module).items() if key not in _MODULE_ITSELF}
    return {**plain, **{key: module._buffers.get(key) for key in module._non_persistent_buffers_set}}


def _same(first: Any, second: Any) -> bool:
    """Whether two values hold the same numbers; what isn't made of numbers counts as the same."""
    if isinstance(first, nn.Parameter):
        return True  # a member fills it, under whatever name it lies here: recurrent layers list theirs
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and same_bits(first, second)
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and np.array_equal(first, second)
    if isinstance(first, list | tuple):
        return (
            isinstance(second, list | tuple)
            and len(first) == len(second)
            and all(_same(a, b) for a, b in zip(first, second, strict=True))
        )
    if isinstance(first, dict):
        return isinstance(second, dict) and all(_same(value, second.get(key)) for key, value in first.items())
    return first == second if isinstance(first, int | float | complex) else True
