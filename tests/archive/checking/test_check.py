"""`--check` answers from a good archive and says what is broken in a bad one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable

import pytest

from archiver.__main__ import main
from archiver.checking import check
from tests.archive.conftest import Project

PHASES = ("unpack", "import", "members", "settings", "build", "stack", "equivalence", "request")


def rewrite(project: Project, change: Callable[[dict[str, bytes]], object]) -> None:
    """Change the files of an archive; the zip itself stays whole."""
    with zipfile.ZipFile(project.mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(project.mar, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def flip(files: dict[str, bytes], name: str) -> None:
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])


def test_a_good_archive_is_answered_phase_by_phase(project: Project, capsys) -> None:
    project.run("tiny")
    (project.folder / "input.json").write_text(json.dumps([0.5, -1.0, 2.0]))
    capsys.readouterr()
    assert project.run("--check", str(project.mar), "input.json") == 0
    lines = capsys.readouterr().out.splitlines()
    seen = [line.split()[0] for line in lines]
    assert [phase for phase in seen if phase in PHASES] == list(PHASES)
    assert "batches of up to 16 after at most 5 ms, workers: 1" in lines[seen.index("serving")]
    assert "m0, m1" in lines[seen.index("members")]
    assert "prediction" in lines[seen.index("request")]


def test_without_input_the_handler_makes_its_own(project: Project, capsys) -> None:
    project.run("tiny")
    assert project.run("--check", str(project.mar)) == 0
    assert "prediction" in capsys.readouterr().out


def test_where_a_subset_is_required_a_member_with_a_weight_is_asked(project: Project, capsys) -> None:
    assert project.run("tiny", "--set", "require_subset=true", 'weights={"m0": 0, "m1": 1}') == 0
    assert project.run("--check", str(project.mar)) == 0
    (answer,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("request")]
    assert "prediction" in answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("members/m1.safetensors"), "members: LoadError: members/m1.safetensors: missing"),
        (
            lambda f: flip(f, "members/m1.safetensors"),
            "members: LoadError: members/m1.safetensors: SHA-256 is",
        ),
        (lambda f: f.update({"tiny_handler.py": b"import gone_for_good\n"}), "import: ModuleNotFoundError"),
        (lambda f: f.update({"setup_config.json": b'{"tempo": 1}'}), "unknown key 'tempo'"),
    ],
)
def test_a_broken_archive_names_phase_and_fault(project: Project, change, message: str, capsys) -> None:
    project.run("tiny")
    rewrite(project, change)
    assert project.run("--check", str(project.mar)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_refused_request_fails_the_check(project: Project, capsys) -> None:
    project.run("tiny")
    (project.folder / "input.json").write_text("[1, 2]")
    assert project.run("--check", str(project.mar), "input.json") == 1
    assert "request: ValueError: the request got status 422" in capsys.readouterr().err


def test_files_that_are_no_archive(project: Project, capsys) -> None:
    project.run("tiny")
    whole = project.mar.read_bytes()
    for data, message in ((whole[:-100], "not a whole archive"), (b"x", "not a whole archive")):
        project.mar.write_bytes(data)
        assert project.run("--check", str(project.mar)) == 1
        assert message in capsys.readouterr().err
    with zipfile.ZipFile(project.mar, "w") as archive:
        archive.writestr("a", b"")
    assert project.run("--check", str(project.mar)) == 1
    assert "no MAR-INF/MANIFEST.json" in capsys.readouterr().err
    assert project.run("--check", "gone.mar") == 1
    assert "gone.mar: no such file" in capsys.readouterr().err
    assert project.run("--check", str(project.mar), "gone.json") == 1
    assert "gone.json: no such file" in capsys.readouterr().err


def test_a_handler_that_hangs_is_ended(project: Project, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    project.run("tiny")
    rewrite(project, lambda f: f.update({"tiny_handler.py": b"import time\ntime.sleep(600)\n"}))
    monkeypatch.setattr(check, "CHECK_TIMEOUT_S", 2)
    assert project.run("--check", str(project.mar)) == 1
    assert "the process ended with -9" in capsys.readouterr().err


def test_an_archive_is_loaded_from_a_folder_given_from_here(project: Project) -> None:
    """The process that loads it works in another folder than the one that the path starts at."""
    assert main(["tiny", "--config", "setup_config.json", "--output", "out"]) == 0
    assert (project.folder / "out" / "tiny.mar").is_file()
