"""Checkpoints read as a plain dict, or are refused by a line that names file and key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmap_ensemble.archive.checkpoints import read_state_dict
from vmap_ensemble.core.states import (
    check_architecture,
    check_finite,
    compare_members,
    find_shared,
    find_ties,
    fit_to_architecture,
    same_bits,
    spec_of,
)
from vmap_ensemble.errors import MemberError


def linear_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict())


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for key in expected:
        assert torch.equal(got[key], expected[key]), key
        assert got[key].dtype == expected[key].dtype


class Tied(nn.Module):
    """Embedding and head are one tensor, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_reads_torch_files(tmp_path: Path, suffix: str) -> None:
    torch.save(linear_state(), tmp_path / f"a{suffix}")
    assert_same(read_state_dict(tmp_path / f"a{suffix}"), linear_state())


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(linear_state(), tmp_path / "a.safetensors")
    got = read_state_dict(tmp_path / "a.safetensors")
    assert_same({key: got[key] for key in linear_state()}, linear_state())


def test_torch_files_are_mapped_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    maps_before = Path("/proc/self/maps").read_text().count("a.pt")
    state = read_state_dict(tmp_path / "a.pt")
    assert Path("/proc/self/maps").read_text().count("a.pt") > maps_before
    assert state["w"].sum() == 0


def test_legacy_files_are_read_whole_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(linear_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.INFO):
        assert_same(read_state_dict(tmp_path / "old.pt"), linear_state())
    assert "old.pt: format from before torch 1.6" in caplog.text


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_unwraps_and_strips(tmp_path: Path, wrapper: str, prefix: str) -> None:
    inner = {prefix + key: value for key, value in linear_state().items()}
    torch.save({wrapper: inner, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt"), linear_state())


def test_a_prefix_that_only_some_keys_carry_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_state_dict(tmp_path / "a.pt")) == ["module.a", "b"]


def test_a_parameter_named_model_is_no_wrapper(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2), "state_dict": torch.ones(1)}, tmp_path / "a.pt")
    assert list(read_state_dict(tmp_path / "a.pt")) == ["model", "state_dict"]


def test_ties_survive_reading(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    assert find_ties([read_state_dict(tmp_path / "a.pt")]) == {"head.weight": "embedding.weight"}


def save_text(path: Path) -> None:
    path.write_text("not a checkpoint")


def save_truncated(path: Path) -> None:
    torch.save(linear_state(), path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "a.txt",
            save_text,
            r"a\.txt: expected a file ending in \.pt, \.pth, \.bin, .*\.safetensors, got '\.txt'",
        ),
        ("gone.pt", lambda path: None, r"gone\.pt: no such file"),
        ("a.pt", save_text, r"a\.pt: holds more than weights, or is no checkpoint"),
        ("a.pt", lambda path: path.touch(), r"a\.pt: not a whole torch checkpoint"),
        ("a.pt", save_truncated, r"a\.pt: not a whole torch checkpoint"),
        ("a.safetensors", save_text, r"a\.safetensors: not a whole safetensors file"),
        ("a.pt", lambda path: torch.save(nn.Linear(1, 1), path), r"holds more than weights"),
        ("a.pt", lambda path: torch.save([torch.ones(1)], path), r"expected a state dict .*, got list"),
        ("a.pt", lambda path: torch.save({}, path), r"a\.pt: the state dict is empty"),
        ("a.pt", lambda path: torch.save({"w": 3}, path), r"key 'w' is int, expected a tensor"),
        (
            "a.pt",
            lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path),
            r"key 'w' is sparse or quantised",
        ),
        (
            "a.pt",
            lambda path: torch.save({"model": linear_state(), "state_dict": linear_state()}, path),
            r"several state dicts \(state_dict, model\)",
        ),
    ],
)
def test_refuses_files(tmp_path: Path, name: str, write, message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(MemberError, match=message):
        read_state_dict(tmp_path / name)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"w": torch.ones(1), "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(MemberError, match=r"evil\.pt: holds more than weights"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_equal_members_pass() -> None:
    compare_members({str(seed): spec_of(linear_state(seed)) for seed in range(5)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"b\.pt: key '0\.bias' is missing; a\.pt has it, \(4,\) float32"),
        (lambda s: s.update(x=torch.ones(2)), r"b\.pt: key 'x' is not in a\.pt; it is \(2,\) float32"),
        (
            lambda s: s.update({"0.weight": torch.ones(4, 2)}),
            r"b\.pt: key '0\.weight' is \(4, 2\) float32, in a\.pt it is \(4, 3\) float32",
        ),
        (
            lambda s: s.update({"0.weight": torch.ones(4, 3, dtype=torch.int64)}),
            r"b\.pt: key '0\.weight' is \(4, 3\) int64, in a\.pt it is \(4, 3\) float32",
        ),
        (
            lambda s: s.update({"0.weight": torch.ones(4, 3, dtype=torch.float16)}),
            r"b\.pt: key '0\.weight' is \(4, 3\) float16, in a\.pt it is \(4, 3\) float32",
        ),
    ],
)
def test_members_that_differ_are_refused(change, message: str) -> None:
    other = linear_state(1)
    change(other)
    with pytest.raises(MemberError, match=message):
        compare_members({"a.pt": spec_of(linear_state()), "b.pt": spec_of(other)})


def test_no_members_are_refused() -> None:
    with pytest.raises(MemberError, match="no members: expected at least one"):
        compare_members({})


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("1.running_mean"),
            r"a: key '1\.running_mean' is missing; Sequential expects \(4,\)",
        ),
        (lambda s: s.update(x=torch.ones(2)), r"a: key 'x' \(\(2,\) float32\) is unknown to Sequential"),
        (
            lambda s: s.update({"0.weight": torch.ones(5, 3)}),
            r"a: key '0\.weight' is \(5, 3\) float32, Sequential expects \(4, 3\) float32",
        ),
        (
            lambda s: s.update({"1.num_batches_tracked": torch.ones(())}),
            r"'1\.num_batches_tracked' is \(\) float32, Sequential expects \(\) int64",
        ),
    ],
)
def test_architecture_mismatch_is_refused(change, message: str) -> None:
    state = linear_state()
    change(state)
    with pytest.raises(MemberError, match=message):
        check_architecture("a", spec_of(state), model())


def test_half_precision_fits_a_float_architecture() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in linear_state().items()}
    assert fit_to_architecture("a", state, model())["0.weight"].dtype == torch.float16


def test_a_missing_batch_counter_is_filled_as_torch_fills_it() -> None:
    state = linear_state()
    del state["1.num_batches_tracked"]
    got = fit_to_architecture("a", state, model())
    assert got["1.num_batches_tracked"].item() == 0
    assert got["1.num_batches_tracked"].dtype == torch.int64
    assert list(got) == list(model().state_dict())


def test_a_key_absent_because_tied_is_joined() -> None:
    weight = torch.randn(5, 4)
    got = fit_to_architecture("a", {"head.weight": weight}, Tied())
    assert got["embedding.weight"] is got["head.weight"]
    assert torch.equal(got["head.weight"], weight)


def test_equal_copies_of_a_tied_tensor_are_joined() -> None:
    weight = torch.randn(5, 4)
    got = fit_to_architecture("a", {"embedding.weight": weight, "head.weight": weight.clone()}, Tied())
    assert find_ties([got]) == {"head.weight": "embedding.weight"}


def test_tied_tensors_that_differ_are_refused() -> None:
    state = {"embedding.weight": torch.ones(5, 4), "head.weight": torch.zeros(5, 4)}
    with pytest.raises(MemberError, match=r"a: 'embedding\.weight' and 'head\.weight' differ, but Tied ties"):
        fit_to_architecture("a", state, Tied())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(value: float) -> None:
    state = linear_state()
    state["0.weight"][0, 0] = value
    with pytest.raises(MemberError, match=r"a: key '0\.weight' holds 1 NaN or infinite values of 12"):
        check_finite("a", state)


def test_ties_must_hold_in_every_member() -> None:
    tied, loose = Tied().state_dict(), {k: v.clone() for k, v in Tied().state_dict().items()}
    assert find_ties([tied, tied]) == {"head.weight": "embedding.weight"}
    assert find_ties([tied, loose]) == {}


def test_views_of_one_storage_are_no_ties() -> None:
    base = torch.arange(12.0)
    state = {"a": base[:6], "b": base[6:], "c": base[:6].view(2, 3), "d": base[:6]}
    assert find_ties([state]) == {"d": "a"}


def test_shared_means_the_same_bytes() -> None:
    nan = torch.tensor([float("nan")])
    a = {"same": torch.ones(2), "other": torch.ones(2), "zero": torch.tensor([0.0]), "nan": nan}
    b = {"same": torch.ones(2), "other": torch.zeros(2), "zero": torch.tensor([-0.0]), "nan": nan.clone()}
    assert find_shared([a, b]) == ["same", "nan"]
    assert find_shared([a, b, {**b, "same": torch.zeros(2)}]) == ["nan"]
    assert find_shared([a]) == []
    assert not same_bits(torch.ones(2), torch.ones(2, 1))
