"""Every way to call a member ends in one file and one name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision

from archiver.members.resolve import NetworkError, resolve_members, unique_names
from vmap_ensemble.errors import ArchiveError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("m1.pt", "m2.pth", "m10.pt", "notes.txt", "folds/0/model.pt", "folds/1/model.pt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(specs: list[str] | dict[str, str], folder: Path) -> list[str]:
    return [source.name for source in resolve_members(specs, folder)]


def test_files_keep_their_order(folder: Path) -> None:
    assert names(["m2.pth", "m1.pt"], folder) == ["m2", "m1"]


def test_folders_and_globs_are_in_natural_order(folder: Path) -> None:
    assert names(["."], folder) == ["m1", "m2", "m10"]
    assert names(["m*.pt"], folder) == ["m1", "m10"]
    assert names(["**/model.pt"], folder) == ["0-model", "1-model"]


def test_given_names_win(folder: Path) -> None:
    assert names({"a": "folds/0/model.pt", "b": "folds/1/*.pt"}, folder) == ["a", "b"]


def test_sources_tell_no_path(folder: Path) -> None:
    assert [s.shown for s in resolve_members(["folds/0/model.pt", "m1.pt"], folder)] == ["model.pt", "m1.pt"]


def test_symlinks_and_parent_folders(folder: Path) -> None:
    (folder / "link.pt").symlink_to("m1.pt")
    assert names(["link.pt"], folder) == ["link"]
    assert names(["../m1.pt"], folder / "folds") == ["m1"]


def test_a_name_that_is_not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.pt")).touch()
    (source,) = resolve_members(["caf*.pt"], folder)
    assert source.name == "caf_"
    assert source.shown == "caf?.pt"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.pt", "b.safetensors"], ["a", "b"]),
        (["fold0/model.pt", "fold1/model.pt"], ["fold0-model", "fold1-model"]),
        (["fold0/model.pt", "fold1/model.pt", "c.pt"], ["fold0-model", "fold1-model", "c"]),
        (["a/x/m.pt", "b/x/m.pt"], ["a-x-m", "b-x-m"]),
        (["d/m.pt", "d/m.pth"], ["m.pt", "m.pth"]),
        (["a b.pt", "a_b.pt"], ["a_b.pt", "a_b.pt-2"]),
        (["a-m.pt", "a/m.pt", "b/m.pt"], ["a-m.pt", "m.pt", "b-m"]),
        (["shared.pt"], ["shared-2"]),
        ([".hidden.pt"], ["hidden"]),
        (["ResNet50_Weights.IMAGENET1K_V1"], ["ResNet50_Weights.IMAGENET1K_V1"]),
    ],
)
def test_names_are_unique_and_safe(paths: list[str], expected: list[str]) -> None:
    got = unique_names([Path(path) for path in paths])
    assert len(set(got)) == len(got)
    assert got == expected


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no members: expected at least one checkpoint"),
        (["gone.pt"], r"member 'gone\.pt': no such file or folder"),
        (["x*.pt"], r"members 'x\*\.pt': no file matches"),
        (["m1.pt", "m*.pt"], r"member 'm1\.pt' is given twice"),
        (["empty"], r"members 'empty': the folder holds no \.pt"),
        ({"a/b": "m1.pt"}, r"member name 'a/b': expected letters"),
        ({"shared": "m1.pt"}, r"member name 'shared'"),
        ({"a": "m*.pt"}, r"member 'a': 'm\*\.pt' stands for 2 files, expected one"),
        (["torchvision:ResNet18_Weights.IMAGENET1K_V9"], r"did you mean 'ResNet18_Weights\.IMAGENET1K_V1'"),
        (["torchvision:nothing"], r"member 'torchvision:nothing': unknown weights"),
    ],
)
def test_refusals(folder: Path, specs: list[str] | dict[str, str], message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ArchiveError, match=message):
        resolve_members(specs, folder)


def test_cached_torchvision_weights_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({}, cached)
    (source,) = resolve_members(["torchvision:ResNet18_Weights.IMAGENET1K_V1"], tmp_path)
    assert source.path == cached
    assert source.name == source.shown == "ResNet18_Weights.IMAGENET1K_V1"


def test_no_network_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Nothing listens there: the same failure as without a network, wherever the test runs.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(NetworkError, match=r"IMAGENET1K_V1': can't be fetched .*; connect, or put resnet18-"):
        resolve_members(["torchvision:ResNet18_Weights.IMAGENET1K_V1"], tmp_path)
