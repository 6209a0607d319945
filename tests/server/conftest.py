"""Fixtures of the server tests: a tiny archive that needs no torch, and a self-signed certificate."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import httpx
import pytest

OK_HANDLER = '''\
"""Answers "ok" and the number of requests in the batch, per request."""


def handle(data, context):
    if data is None:
        return None
    return [f"ok {len(data)}" for _ in data]
'''


def write_archive(folder: Path, name: str, handler: str) -> Path:
    """Packs one handler module into a .mar, by hand: the archiver would be another thing under test."""
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": {"modelName": name, "handler": "handler.py", "modelVersion": "1.0"},
        "archiverVersion": "0.12.0",
    }
    path = folder / f"{name}.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("handler.py", handler)
    return path


@pytest.fixture(scope="session")
def ok_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("ok"), "ok", OK_HANDLER)


@pytest.fixture(scope="session")
def broken_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    handler = 'def handle(data, context):\n    raise ValueError("member b lacks the key fc.weight")\n'
    return write_archive(tmp_path_factory.mktemp("broken"), "broken", handler)


@pytest.fixture(scope="session")
def recorded_archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The archives that tests/server/recorded.py asks."""
    from tests.server.test_bad_inputs import build_archive

    return {name: build_archive(tmp_path_factory.mktemp(name), name) for name in ("mnist", "bert")}


@pytest.fixture(scope="session")
def recorded_answers(recorded_archives: dict[str, Path]) -> list[httpx.Response]:
    """What TorchServe answers to the recorded requests, each asked alone."""
    from scripts.private_torchserve import TorchServe
    from tests.server.recorded import REQUESTS, ask_all

    with TorchServe(recorded_archives, batching={"batchSize": 1}) as server, server.client() as client:
        answers = ask_all(client, REQUESTS, 1)
    assert {answer.status_code for answer in answers} >= {200, 400, 413, 415, 422, 501}
    return answers


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, made as docs/deployment.md says."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "private_key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
