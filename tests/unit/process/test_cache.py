"""A worker starts whatever home its user has, and whatever lies in the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.choice_cache import Choice, ChoiceCache
from vmap_ensemble.execution.cpu.kernel_library import INSTRUCTION_SETS, build_library
from vmap_ensemble.process.cache import cache_folder


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def choices(folder: Path) -> ChoiceCache:
    return ChoiceCache(folder, "hash", [(torch.ones(1, 2),)], torch.device("cpu"), ["eager"], [])


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vmap-ensemble"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == tmp_path / "home/.cache/vmap-ensemble"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    folder = cache_folder()
    assert folder.is_relative_to(os.devnull)
    cache = choices(folder)
    cache.write(Choice("eager", "why", []), settled=True)
    assert cache.read() is None
    with pytest.raises(LoadError):
        build_library(next(iter(INSTRUCTION_SETS.values())), folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b'{"key": 5}', b"\xff\xfe\x00", b"[" * 100_000, b'"text"', b"{}"]
)
def test_a_cache_file_of_any_content_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    cache = choices(tmp_path)
    cache.path.write_bytes(content)
    assert cache.read() is None


def test_a_cache_file_with_the_right_key_and_nothing_else(tmp_path: Path) -> None:
    cache = choices(tmp_path)
    for rest in ({}, {"measurements": [], "settled": True}, {"measurements": 1, "settled": True, "candidates": 4}):
        cache.path.write_text(json.dumps({"key": cache.key, **rest}))
        assert cache.read() is None
