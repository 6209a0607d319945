"""What load_state_dict(strict=True) accepts is accepted, and means what torch makes of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from vmap_ensemble.core.states import check_architecture, fit_to_architecture, renamed, spec_of
from vmap_ensemble.errors import MemberError


class Renaming(nn.Module):
    """Renames an old key and turns old values round, as its version says."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, versions: dict[str, Any], *rest: Any) -> None:
        if versions.get("version", 1) < 2 and f"{prefix}inverse" in state:
            state[f"{prefix}scale"] = 1 / state.pop(f"{prefix}inverse")
        super()._load_from_state_dict(state, prefix, versions, *rest)


class Negating(Renaming):
    """The same keys mean something else in an older version."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, versions: dict[str, Any], *rest: Any) -> None:
        if versions.get("version", 2) < 2:
            state[f"{prefix}scale"] = -state[f"{prefix}scale"]
        nn.Module._load_from_state_dict(self, state, prefix, versions, *rest)


def test_a_hook_renames_and_computes() -> None:
    model = nn.Sequential(Renaming())
    got = fit_to_architecture("a", {"0.inverse": torch.tensor([1.0, 2.0, 4.0])}, model)
    assert got["0.scale"].tolist() == [1.0, 0.5, 0.25]
    assert model[0].scale.tolist() == [0.0, 0.0, 0.0]


def test_a_hook_reads_the_version_that_torch_saved() -> None:
    state: Any = OrderedDict({"0.scale": torch.ones(3)})
    state._metadata = OrderedDict({"": {"version": 1}, "0": {"version": 1}})
    assert fit_to_architecture("a", state, nn.Sequential(Negating()))["0.scale"].tolist() == [-1.0] * 3
    del state._metadata
    assert fit_to_architecture("a", state, nn.Sequential(Negating()))["0.scale"].tolist() == [1.0] * 3


def test_versions_move_with_the_keys() -> None:
    state: Any = OrderedDict({"module.0.scale": torch.ones(3)})
    state._metadata = OrderedDict({"": {}, "module": {"version": 5}, "module.0": {"version": 1}})
    moved: Any = renamed(state, lambda key: key.removeprefix("module."))
    assert list(moved) == ["0.scale"]
    assert dict(moved._metadata) == {"": {"version": 5}, "0": {"version": 1}}
    with pytest.raises(MemberError, match="two keys become 'x'"):
        renamed({"a": torch.ones(1), "b": torch.ones(1)}, lambda key: "x")


def test_old_keys_of_weight_norm() -> None:
    torch.manual_seed(0)
    old = weight_norm(nn.Linear(3, 4))
    new = parametrizations.weight_norm(nn.Linear(3, 4))
    got = fit_to_architecture("a", old.state_dict(), nn.Sequential(new)[0])
    new.load_state_dict(old.state_dict())
    assert {key: value.tolist() for key, value in got.items()} == {k: v.tolist() for k, v in new.state_dict().items()}
    x = torch.randn(2, 3)
    torch.testing.assert_close(new(x), old(x))


def test_old_keys_of_vision_transformers() -> None:
    torch.manual_seed(0)
    build = lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3)  # noqa: E731
    model = build()
    state = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in model.state_dict().items()
    }
    got = fit_to_architecture("a", state, build())
    assert {key: value.tolist() for key, value in got.items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_half_precision_stays_half_through_hooks() -> None:
    got = fit_to_architecture("a", {"0.inverse": torch.full((3,), 2.0).half()}, nn.Sequential(Renaming()))
    assert got["0.scale"].dtype == torch.float16


def test_a_hook_that_refuses_leaves_the_line_of_the_keys() -> None:
    with pytest.raises(MemberError, match=r"a: key '0\.scale' is missing; Sequential expects \(3,\)"):
        fit_to_architecture("a", {"0.other": torch.ones(3)}, nn.Sequential(Renaming()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool, torch.uint8])
def test_integers_come_in_the_architectures_own_type(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("index", torch.tensor([0, 1, 1]))
    got = fit_to_architecture("a", {"index": torch.tensor([1, 0, 1]).to(dtype)}, model)
    assert got["index"].dtype == torch.int64
    assert got["index"].tolist() == [1, 0, 1]


def test_fractions_are_no_integers_and_integers_no_weights() -> None:
    model = nn.Module()
    model.register_buffer("index", torch.tensor([0, 1]))
    model.register_parameter("w", nn.Parameter(torch.ones(2)))
    weight = torch.ones(2)
    with pytest.raises(MemberError, match=r"'index' is \(2,\) float32, Module expects \(2,\) int64"):
        fit_to_architecture("a", {"index": torch.tensor([0.5, 1.0]), "w": weight}, model)
    with pytest.raises(MemberError, match=r"'w' is \(2,\) int8, Module expects \(2,\) float32"):
        fit_to_architecture("a", {"index": torch.tensor([0, 1]), "w": weight.to(torch.int8)}, model)


class Extra(nn.Linear):
    """Keeps a number outside of its parameters."""

    def get_extra_state(self) -> Any:
        return {"scale": 2}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


def test_extra_state_is_refused_by_the_modules_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Extra(2, 2))
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for check in (
        lambda: fit_to_architecture("a", state, model),
        lambda: check_architecture("a", spec_of(state), model),
    ):
        with pytest.raises(MemberError, match=r"Sequential: '1' keeps state in get_extra_state"):
            check()


def test_single_numbers_of_torch_03_are_vectors_of_one() -> None:
    model = nn.Module()
    model.register_parameter("scale", nn.Parameter(torch.tensor(0.0)))
    got = fit_to_architecture("a", {"scale": torch.tensor([2.5])}, model)
    model.load_state_dict({"scale": torch.tensor([2.5])})
    assert got["scale"].shape == ()
    assert got["scale"].item() == model.scale.item() == 2.5
