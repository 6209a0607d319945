"""Fixtures of the server tests: a tiny archive that needs no torch, and a self-signed certificate."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

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
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, made as docs/deployment.md says."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "private_key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
