"""What the command line finds to serve, and what it refuses before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("kserve")

from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.errors import LoadError
from vmap_ensemble.frontends.kserve.__main__ import find_archives, main, parse_arguments


def test_a_single_archive_has_the_name_of_the_service(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--model_dir .*: expected an archive, or a folder with one, got neither"):
        find_archives(tmp_path, "ens")
    (tmp_path / "a.mar").touch()
    assert find_archives(tmp_path, "ens") == {"ens": tmp_path / "a.mar"}
    assert find_archives(tmp_path / "a.mar", "ens") == {"ens": tmp_path / "a.mar"}


def test_several_have_their_own_and_an_unpacked_one_is_one(tmp_path: Path) -> None:
    for name in ("a.mar", "b.mar"):
        (tmp_path / name).touch()
    assert find_archives(tmp_path, "ens") == {"a": tmp_path / "a.mar", "b": tmp_path / "b.mar"}
    (tmp_path / SETTINGS_FILE).touch()
    assert find_archives(tmp_path, "ens") == {"ens": tmp_path}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--workers", "2"], "--workers: expected 1, got 2"),
        (["--batch_size", "0"], "--batch_size: expected 1 or more, got 0"),
        (["--settings", "[1]"], "expected an object of JSON, got list"),
        (["--settings", "{"], "--settings: invalid"),
        (["--batch", "3"], "unrecognized arguments"),
    ],
)
def test_wrong_options(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(given)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_cant_be_loaded_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mar").write_bytes(b"no archive")
    assert main(["--model_dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("kserve: a.mar: not a whole archive")
