"""The lines of docs/moving.md that serve an archive from LitServe answer the recorded requests as TorchServe does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("litserve")
pytest.importorskip("transformers")

from scripts.private_torchserve import ROOT, free_ports
from tests.server import bad_inputs as bad
from tests.server.recorded import REQUESTS, ask_all, check_answers

pytestmark = pytest.mark.timeout(180)
PATH = "/predictions/ens"


@pytest.fixture
def served(recorded_archives: dict[str, Path], tmp_path: Path) -> Iterator[httpx.Client]:
    """The block of the page, as it is written but for its port."""
    page = (ROOT / "docs/moving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import litserve.*?)```", page, re.S)
    (port,) = free_ports(1)
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "mnist_ens.mar").symlink_to(recorded_archives["mnist"])
    (tmp_path / "served.py").write_text(block.replace("port=8000", f"port={port}"), encoding="utf-8")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "served.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "handlers")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            assert wait_until_healthy(client, process), (tmp_path / "log").read_text()[-3000:]
            yield client
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait(timeout=10)


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes], timeout_s: float = 90) -> bool:
    ends = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < ends:
        try:
            if client.get("/health").status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def is_json(one: bad.Sent) -> bool:
    """Whether LitServe hands a request on as it came: JSON, and nothing in headers.

    Not what is nested deep: it pickles bodies for another process.
    """
    content = one.request.get("content")
    if one.request.get("headers") != bad.JSON or not isinstance(content, bytes) or one.kind.startswith("deep"):
        return False
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def test_json_is_answered_as_by_torchserve(served: httpx.Client, recorded_answers: list[httpx.Response]) -> None:
    chosen = [
        ((PATH, one), answer)
        for (path, one), answer in zip(REQUESTS, recorded_answers, strict=True)
        if path == "/predictions/mnist" and is_json(one)
    ]
    assert {answer.status_code for _, answer in chosen} >= {200, 400, 413}
    requests = [recorded for recorded, _ in chosen]
    check_answers(requests, ask_all(served, requests, 8), [answer for _, answer in chosen])
