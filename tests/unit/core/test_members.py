"""An archive's members come back as the stack of exactly the checkpoints that went in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmap_ensemble.archive.manifest import (
    Manifest,
    check_code,
    check_hashes,
    hash_file,
    list_code,
    load_members,
    read_manifest,
)
from vmap_ensemble.core.members import Member, StackedMembers, stack_members
from vmap_ensemble.errors import LoadError, MemberError


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    got = dict(model.state_dict())
    got["1.num_batches_tracked"] = torch.tensor(seed)
    return got


def states(count: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"m{seed}": state(seed) for seed in range(count)}


def row(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Member:
    path = folder / "members" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return Member(name, f"members/{name}.safetensors", hash_file(path), f"{name}.pt", path.stat().st_size)


def write_archive(folder: Path, count: int = 2, ties: dict[str, str] | None = None) -> Manifest:
    """An unpacked archive: batch norm's running statistics are shared, the rest differs."""
    shared_keys = [key for key in state(0) if "running" in key]
    own = [
        row(folder, name, {key: value for key, value in tensors.items() if key not in shared_keys})
        for name, tensors in states(count).items()
    ]
    shared = row(folder, "shared", {key: state(0)[key] for key in shared_keys})
    manifest = Manifest(tuple(own), shared, ties or {})
    (folder / "members.json").write_text(manifest.to_json())
    return manifest


def assert_stack_of(got: StackedMembers, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert got.names == tuple(expected)
    assert set(got.stacked) | set(got.shared) == set(state(0))
    for index, tensors in enumerate(expected.values()):
        for key, tensor in tensors.items():
            value = got.stacked[key][index] if key in got.stacked else got.shared[key]
            assert torch.equal(value, tensor), key


@pytest.mark.parametrize("count", [1, 2, 5])
def test_loads_what_was_written(tmp_path: Path, count: int) -> None:
    manifest = write_archive(tmp_path, count)
    got = load_members(tmp_path)
    assert_stack_of(got, states(count))
    assert got.members == manifest.members
    assert got.stacked["0.weight"].shape == (count, 4, 3)
    assert got.stacked["1.num_batches_tracked"].tolist() == list(range(count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_floats_and_never_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    write_archive(tmp_path)
    got = load_members(tmp_path, dtype=dtype)
    assert torch.equal(got.stacked["0.weight"][1], state(1)["0.weight"].to(dtype))
    assert got.shared["1.running_mean"].dtype == dtype
    assert got.stacked["1.num_batches_tracked"].dtype == torch.int64


def test_tells_its_progress(tmp_path: Path) -> None:
    write_archive(tmp_path)
    calls: list[tuple[str, int, int]] = []
    load_members(tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [("m0", 1, 2), ("m1", 2, 2)]


def test_the_stack_outlives_the_files(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    got = load_members(tmp_path)
    for member in manifest.files():
        (tmp_path / member.file).write_bytes(b"")
    assert_stack_of(got, states(2))


def test_tied_keys_are_one_tensor_object(tmp_path: Path) -> None:
    write_archive(tmp_path, ties={"head": "0.weight", "tail": "1.running_mean"})
    got = load_members(tmp_path)
    assert got.stacked["head"] is got.stacked["0.weight"]
    assert got.shared["tail"] is got.shared["1.running_mean"]
    assert got.size_bytes() == 2 * (12 + 4 + 4 + 4) * 4 + 2 * 8 + 2 * 4 * 4


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "members.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_first(folder: Path, **changes: object) -> None:
    rows = json.loads((folder / "members.json").read_text())["members"]
    rewrite(folder, members=[{**rows[0], **changes}, *rows[1:]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "members.json").unlink(), r"members\.json: not in the archive"),
        (lambda f: (f / "members.json").write_text("{"), r"members\.json: malformed"),
        (lambda f: (f / "members.json").write_text("[]"), r"members\.json: malformed"),
        (lambda f: rewrite(f, members=[]), r"members\.json: lists no members"),
        (lambda f: (f / "members/m1.safetensors").unlink(), r"members/m1\.safetensors: missing .* for 'm1'"),
        (lambda f: (f / "members/shared.safetensors").unlink(), r"members/shared\.safetensors: missing"),
        (
            lambda f: (f / "members/extra.safetensors").touch(),
            r"members/extra\.safetensors: .* doesn't list it",
        ),
        (
            lambda f: (f / "members/m1.safetensors").rename(f / "members/m9.safetensors"),
            r"members/m1\.safetensors: missing",
        ),
        (
            lambda f: (f / "members/m0.safetensors").write_bytes(b"12345678"),
            r"members/m0\.safetensors: 8 bytes, members\.json says \d+; the file is cut short",
        ),
        (lambda f: change_first(f, name="m1"), r"name 'm1' is listed twice"),
        (lambda f: change_first(f, file="members/m1.safetensors"), r"file .* is listed twice"),
        (lambda f: change_first(f, file="../m0.safetensors"), r"is not of the form members/<name>"),
        (lambda f: change_first(f, file="members/.."), r"is not of the form members/<name>"),
        (lambda f: change_first(f, file="/etc/passwd"), r"is not of the form members/<name>"),
        (lambda f: rewrite(f, ties={"a": "gone"}), r"'a' is tied to 'gone', which no file holds"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write_archive(tmp_path)
    damage(tmp_path)
    with pytest.raises(LoadError, match=message):
        load_members(tmp_path)


def test_garbage_of_the_right_size_names_the_member(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    (tmp_path / "members/m1.safetensors").write_bytes(b"\xff" * manifest.members[1].size_bytes)
    with pytest.raises(LoadError, match=r"members/m1\.safetensors: member 'm1' can't be read"):
        load_members(tmp_path)


def test_a_member_of_another_shape_is_named(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    other = row(tmp_path, "m1", {**state(1), "0.weight": torch.ones(2, 2)})
    (tmp_path / "members.json").write_text(replace(manifest, members=(manifest.members[0], other)).to_json())
    with pytest.raises(LoadError, match=r"members/m1\.safetensors: key '0\.weight' is \(2, 2\) float32, in"):
        load_members(tmp_path)


def test_a_member_changed_in_place_is_not_served(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    path = tmp_path / manifest.members[1].file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(LoadError, match=r"members/m1\.safetensors: SHA-256 is .*; the file changed after"):
        load_members(tmp_path)


def test_changed_code_is_refused(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernels.so").write_bytes(b"library")
    (tmp_path / "handler.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("no code")
    listed = replace(manifest, code=list_code(tmp_path))
    assert list(listed.code) == ["handler.py", "package/kernels.so"]
    (tmp_path / "members.json").write_text(listed.to_json())
    check_code(tmp_path, read_manifest(tmp_path))
    (tmp_path / "package" / "kernels.so").write_bytes(b"another")
    with pytest.raises(LoadError, match=r"package/kernels\.so: changed after it was archived"):
        check_code(tmp_path, read_manifest(tmp_path))
    (tmp_path / "handler.py").unlink()
    with pytest.raises(LoadError, match=r"handler\.py: missing in the archive"):
        check_code(tmp_path, read_manifest(tmp_path))


def test_a_flipped_bit_is_found_by_the_hash(tmp_path: Path) -> None:
    manifest = write_archive(tmp_path)
    check_hashes(tmp_path, read_manifest(tmp_path))
    path = tmp_path / manifest.members[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"members/m1\.safetensors: SHA-256 is"):
        check_hashes(tmp_path, read_manifest(tmp_path))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stacking_in_memory_equals_torch_stack(count: int) -> None:
    got = stack_members(states(count))
    assert_stack_of(got, states(count))
    expected = torch.stack([state(seed)["0.weight"] for seed in range(count)])
    assert torch.equal(got.stacked["0.weight"], expected)
    assert ("1.running_mean" in got.shared) == (count > 1)


def test_equal_members_share_everything() -> None:
    got = stack_members({"a": state(0), "b": state(0)})
    assert not got.stacked
    assert torch.equal(got.shared["0.weight"], state(0)["0.weight"])


def test_spec_is_of_one_member() -> None:
    assert stack_members(states(3)).spec() == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state(0).items()
    }


def test_stacking_unlike_states_is_refused() -> None:
    with pytest.raises(MemberError, match=r"b: key '0\.bias' is missing; a has it"):
        stack_members({"a": state(0), "b": {k: v for k, v in state(1).items() if k != "0.bias"}})
