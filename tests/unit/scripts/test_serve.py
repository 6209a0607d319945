"""scripts/serve.py: what is stale, what is missing and which process is ours, without starting a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from scripts import serve
from scripts.torchserve_process import Launch, ServerError, explain_failure, read_properties, stop


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "handlers").mkdir()
    (tmp_path / "model_store").mkdir()
    (tmp_path / "setup_config.json").write_text(json.dumps({"a_ens": {"members": ["m/*.pt"]}}))
    monkeypatch.setattr(serve, "ROOT", tmp_path)
    return tmp_path


def test_unknown_archive_names_the_known(root: Path) -> None:
    with pytest.raises(ServerError, match=r"no archive 'b_ens': expected one of a_ens"):
        serve.read_block("b_ens")


def test_missing_members_without_a_demo_are_named(root: Path) -> None:
    with pytest.raises(ServerError, match=r"members of a_ens are missing: m/\*\.pt"):
        serve.ensure_members("a_ens", serve.read_block("a_ens"))


def test_members_of_a_stopped_run_are_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serve.DEMOS, "a_ens", serve.Demo(("make",), ()))
    (root / "m").mkdir()

    def stopped_halfway(*command: str) -> None:
        (root / "m" / "first.pt").write_bytes(b"x")
        raise ServerError("stopped")

    monkeypatch.setattr(serve, "run_module", stopped_halfway)
    with pytest.raises(ServerError, match="stopped"):
        serve.ensure_members("a_ens", serve.read_block("a_ens"))

    runs: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve, "run_module", lambda *command: runs.append(command))
    serve.ensure_members("a_ens", serve.read_block("a_ens"))
    serve.ensure_members("a_ens", serve.read_block("a_ens"))
    assert runs == [("make",)]


def test_a_fresh_archive_is_kept_and_a_stale_one_is_built(root: Path) -> None:
    archive = root / "model_store" / "a_ens.mar"
    archive.write_bytes(b"x")
    block = serve.read_block("a_ens")
    os.utime(root / "setup_config.json", (1000, 1000))
    os.utime(archive, (2000, 2000))
    assert serve.ensure_archive("a_ens", block) == archive

    (root / "m").mkdir()
    (root / "m" / "x.pt").write_bytes(b"new member")
    builder = root / "archive.sh"
    builder.write_text('#!/bin/sh\nprintf "%s" "$*" > model_store/a_ens.mar\n')
    builder.chmod(0o755)
    serve.ensure_archive("a_ens", block)
    assert archive.read_text() == "a_ens --force"


def test_only_the_recorded_process_is_stopped(tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("inference_address=http://127.0.0.1:1\n")
    service = serve.Service(tmp_path, config)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        # The pid was used again by a process that is no TorchServe.
        created = psutil.Process(stranger.pid).create_time()
        service.state_file.write_text(json.dumps({"pid": stranger.pid, "create_time_s": created}))
        assert service.stop() is False
        assert stranger.poll() is None
        assert not service.state_file.exists()
    finally:
        stop(stranger.pid)
        stranger.wait(timeout=10)


def test_failure_shows_the_error_not_the_traceback(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "c", tmp_path, {}, tmp_path, tmp_path)
    launch.log_dir.mkdir()
    prefix = "2026-01-01T00:00:00,000 [INFO ] W-9000-ens_1.0-stdout MODEL_LOG - "
    error = "vmap_ensemble.errors.MemberError: b: no fc"
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1', error]
    (launch.log_dir / "model_log.log").write_text("".join(f"{prefix}{line}\n" for line in lines))
    assert explain_failure(launch) == error


def test_properties_are_read_as_torchserve_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_text("# a=b\n key = x=y \n\n")
    assert read_properties(file) == {"key": "x=y"}
