"""docs/versions.md on a real TorchServe: another version takes over, and back, while requests run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
import torch

from archiver.__main__ import main as archive
from scripts.private_torchserve import ROOT, TorchServe
from vmap_ensemble.models.mnist import MnistNet

PAGE = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^curl .*", PAGE, re.M)


def build(folder: Path, version: str, bias: float) -> Path:
    """One member that always answers the class whose bias is high: 1.0 says 1, 2.0 says 2."""
    torch.manual_seed(0)
    state = MnistNet().state_dict()
    last = list(state)[-1]
    state[last] = torch.zeros_like(state[last])
    state[last][int(float(version))] = bias
    torch.save(state, folder / "a.pt")
    target = folder / version
    code = archive(
        ["mnist_ens", "--members", str(folder / "a.pt"), "--version", version, "--output", str(target), "--no-check"]
    )
    assert code == 0
    return target / "mnist_ens.mar"


def run(command: str, server: TorchServe) -> str:
    """One line of the page with this server's ports."""
    for port, url in (("8080", server.inference_url), ("8081", server.management_url)):
        command = command.replace(f"http://127.0.0.1:{port}", url)
    words = shlex.split(command, comments=True)
    done = subprocess.run([*words, "-sS", "--fail-with-body"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_update_and_roll_back_lose_nothing(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    first, second = build(tmp_path, "1.0", 1e6), build(tmp_path, "2.0", 1e6)
    digit = (ROOT / "data" / "digits" / "3.png").read_bytes()
    seen: list[tuple[int, str]] = []
    done = threading.Event()
    with TorchServe({"ens": first}) as server:
        shutil.copy(second, server.launch.model_store / "mnist_ens-2.0.mar")

        def ask() -> None:
            with server.client() as client:
                while not done.is_set():
                    answer = client.post("/predictions/ens", content=digit)
                    seen.append((answer.status_code, answer.json().get("prediction", {}).get("label")))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            register, one, default, delete, back = COMMANDS[:5]
            run(register, server)
            assert '"label":"2"' in run(one, server).replace(" ", "")
            run(default, server)
            wait_for(seen, "2")
            run(back, server)
            wait_for(seen, "1", start=len(seen))
            refused = httpx.delete(f"{server.management_url}/models/ens/1.0", trust_env=False)
            assert refused.status_code == 403
            run(default, server)
            wait_for(seen, "2", start=len(seen))  # what waits for a version that is deleted is lost, says the page
            run(delete, server)
            wait_for(seen, "2", start=len(seen))
        finally:
            done.set()
            asking.join()
        listed = httpx.get(f"{server.management_url}/models/ens/all", trust_env=False).json()
    assert {status for status, _ in seen} == {200}
    assert [row["modelVersion"] for row in listed] == ["2.0"]
    order = [
        label
        for label, before in zip([s[1] for s in seen][1:], [s[1] for s in seen], strict=False)
        if label != before
    ]
    assert order == ["2", "1", "2"]


def wait_for(seen: list[tuple[int, str]], label: str, start: int = 0) -> None:
    """Until an answer with this label arrives."""
    limit = threading.Event()
    for _ in range(600):
        if any(row[1] == label for row in seen[start:]):
            return
        limit.wait(0.1)
    raise AssertionError(f"no answer '{label}' after {len(seen)} requests")
