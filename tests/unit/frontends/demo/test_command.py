"""What `vmap-ensemble demo` refuses."""

from __future__ import annotations

import socket
import sys

import pytest

from vmap_ensemble.frontends.demo.command import main, parse_arguments


@pytest.mark.parametrize("wrong", [["--port", "70000"], ["--name", "a/b"], ["--host", "0.0.0.0"]])
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["x.mar", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["no-such.mar", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}: Address already in use; --port 0 takes a free one" in capsys.readouterr().err


def test_an_archive_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "x.mar").write_bytes(b"no archive")
    assert main([str(tmp_path / "x.mar"), "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("demo: ")


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # an import of it fails
    assert main(["x.mar"]) == 1
    assert "the page needs uvicorn: pip install 'vmap-ensemble[page]'" in capsys.readouterr().err
