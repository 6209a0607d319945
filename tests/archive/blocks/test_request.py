"""Values of a block that make no sense are refused in one line, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from archiver.blocks.read import read_blocks
from archiver.blocks.request import make_request
from archiver.members.resolve import LONGEST_NAME, resolve_members, unique_names
from vmap_ensemble.errors import ArchiveError

# What an editor checks a file by, made of the same model.
EDITORS_SCHEMA = Draft202012Validator(
    json.loads((Path(__file__).parents[3] / "docs" / "setup_config.schema.json").read_text(encoding="utf-8"))
)
BLOCK = {"handler": "mnist_handler.py", "members": ["a.pt"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"handler": 5}, "handler: expected the name of a .py file, got 5"),
        ({"handler": ["a.py"]}, r"handler: expected the name of a .py file, got \['a.py'\]"),
        ({"handler": {}}, r"handler: expected the name of a .py file, got \{\}"),
        ({"version": ["1.0"]}, r"version: expected digits"),
        ({"version": "1/0"}, r"version: expected digits"),
        ({"version": True}, r"version: expected digits"),
        ({"allow_nan": "false"}, "allow_nan: expected true or false, got 'false'"),
        ({"members": 5}, "members: expected paths"),
        ({"members": [["a.pt"]]}, "members: expected paths"),
        ({"labels": ["cat"]}, "labels: expected a path"),
        ({"checkpoint_weights": 3}, "checkpoint_weights: expected a name, got 3"),
        ({"labels": ""}, "labels: expected a path, got ''"),
        ({"extra_files": "a.py"}, "extra_files: expected a list of paths, got 'a.py'"),
        ({"samples": [3]}, r"samples: expected paths of files or folders, got \[3\]"),
        ({"max_changed_predictions": 2}, "max_changed_predictions: expected a share from 0 to 1, got 2"),
        ({"max_changed_predictions": True}, "max_changed_predictions: expected a share from 0 to 1, got True"),
        ({"checkpoint_weights": ""}, "checkpoint_weights: expected a name, got ''"),
    ],
)
def test_bad_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchiveError, match=f"'ens': {message}"):
        make_request("ens", {"ens": {**BLOCK, **changes}}, tmp_path)
    assert not EDITORS_SCHEMA.is_valid({"ens": {**BLOCK, **changes}})


def test_versions_as_people_write_them(tmp_path: Path) -> None:
    for value, text in (("1.0", "1.0"), (2, "2"), (1.5, "1.5"), ("2.0.1-rc1", "2.0.1-rc1")):
        assert make_request("ens", {"ens": {**BLOCK, "version": value}}, tmp_path).version == text
        assert EDITORS_SCHEMA.is_valid({"ens": {**BLOCK, "version": value}})


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"archive name .*at most 200"):
        make_request("a" * 300, {"a" * 300: BLOCK}, tmp_path)
    with pytest.raises(ArchiveError, match=r"member name 'mmm.*300 characters, expected at most 200"):
        resolve_members({"m" * 300: "a.pt"}, tmp_path)
    with pytest.raises(ArchiveError, match="members: can't be looked for"):
        resolve_members(["x" * 5000], tmp_path)
    long = [Path("/".join([*["folder" * 30] * 3, end, "m.pt"])) for end in ("a", "b")]
    assert all(len(name) <= LONGEST_NAME + 4 for name in unique_names(long))
    assert len(set(unique_names(long))) == 2


@pytest.mark.parametrize("members", [[], {}])
def test_no_members(tmp_path: Path, members: Any) -> None:
    with pytest.raises(ArchiveError, match="no members: expected at least one checkpoint"):
        resolve_members(members, tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a": 3}', "\x00"])
def test_files_that_are_no_blocks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "setup_config.json"
    path.write_text(text)
    with pytest.raises(ArchiveError, match=r"setup_config.json: (expected|block 'a': expected)"):
        read_blocks(path)


def test_the_schema_that_editors_read_is_no_block(tmp_path):
    path = tmp_path / "setup_config.json"
    path.write_text(json.dumps({"$schema": "docs/setup_config.schema.json", "ens": BLOCK}))
    assert read_blocks(path) == {"ens": BLOCK}


def test_paths_of_the_command_line_start_where_the_caller_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, block = tmp_path / "here", tmp_path / "block"
    here.mkdir()
    monkeypatch.chdir(here)
    told = {"labels": "l.json", "extra_files": ["x.py"], "samples": "photos", "model_file": "model.py:Net"}
    request = make_request("ens", {"ens": BLOCK}, block, set=told)
    assert (request.labels, request.model_file) == (here / "l.json", here / "model.py")
    assert (request.extra_files, request.samples) == ((here / "x.py",), (here / "photos",))
    assert request.settings["architecture"] == "model.py:Net"
    request = make_request("ens", {"ens": {**BLOCK, **told}}, block)
    assert (request.labels, request.extra_files) == (block / "l.json", (block / "x.py",))
    with pytest.raises(ArchiveError, match="'ens': labels: expected a path, got 3"):
        make_request("ens", {"ens": BLOCK}, block, set={"labels": 3})
