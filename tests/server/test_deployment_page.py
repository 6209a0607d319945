"""docs/deployment.md and docs/monitoring.md as written, in a copy of the repository; only the ports are others."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from archiver.__main__ import main as archive
from scripts.private_torchserve import ROOT, free_ports
from tests.server.test_readme import copy_repository
from vmap_ensemble.models.mnist import MnistNet

PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"\n\n((?: {4}[^\n]*\n)+)", PAGE)
PORTS = ("8443", "8444", "8445", "7070", "7071")


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


@dataclass
class Copy:
    """A copy of the repository, and which ports stand for the page's."""

    folder: Path
    ports: dict[str, str]

    def shell(self, text: str) -> str:
        for old, new in self.ports.items():
            text = text.replace(f":{old}", f":{new}")
        return text

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-ec", self.shell(text)]
        path = f"{self.folder}/.venv/bin:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{self.folder}/handlers:{self.folder}"}
        return subprocess.run(shell, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """The page's production server, started as the command of a container."""
    folder = tmp_path_factory.mktemp("p")  # a worker's socket needs a short path
    copy_repository(folder)
    copy = Copy(folder, dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True)))
    config = folder / "config" / "production.properties"
    text = config.read_text(encoding="utf-8")
    for old, new in copy.ports.items():
        text = re.sub(rf"(?<=[:=]){old}$", new, text, flags=re.M)
    config.write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    torch.save(MnistNet().state_dict(), folder / "a.pt")
    built = ["mnist_ens", "--members", str(folder / "a.pt"), "--output", str(folder / "model_store")]
    assert archive([*built, "--no-check", "--set", "execution=eager"]) == 0
    made = copy.run(block_with("openssl"))
    assert made.returncode == 0, made.stderr
    variables = block_with("export TEMP").partition("    torchserve --start")[0]
    command = "exec torchserve --foreground" + block_with("--foreground").partition("torchserve --foreground")[2]
    with (folder / "console.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-ec", variables + command], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_answered(copy)
        yield copy
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def wait_until_answered(copy: Copy, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(1)
        if '"prediction"' in copy.run(block_with("key=")).stdout:
            return
    raise AssertionError((copy.folder / "console.log").read_text()[-2000:])


def test_a_key_and_the_certificate_open_predictions(running: Copy) -> None:
    answer = json.loads(running.run(block_with("key=")).stdout)
    assert 0 < answer["prediction"]["probability"] <= 1


def test_another_key_is_made(running: Copy) -> None:
    keys = running.folder / "key_file.json"
    before = json.loads(keys.read_text())["inference"]["key"]
    assert running.run(block_with("api=")).returncode == 0
    assert json.loads(keys.read_text())["inference"]["key"] != before


def test_health_is_asked_with_a_key(running: Copy) -> None:
    asked = running.run(block_with("health https").replace("vmap-ensemble ", "python -m archiver.command "))
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("healthy: ")


def test_what_the_page_of_the_proxy_says_of_torchserves_keys_and_tls(running: Copy) -> None:
    keys = json.loads((running.folder / "key_file.json").read_text())
    assert len(base64.urlsafe_b64decode(keys["inference"]["key"])) * 8 == 48
    trusted = ssl.create_default_context(cafile=str(running.folder / "config" / "tls" / "certificate.pem"))

    def cipher() -> str:
        plain = socket.create_connection(("127.0.0.1", int(running.ports["8443"])), timeout=30)
        with plain, trusted.wrap_socket(plain, server_hostname="127.0.0.1") as stream:
            return stream.cipher()[0]

    trusted.minimum_version = ssl.TLSVersion.TLSv1_3
    with pytest.raises(ssl.SSLError):
        cipher()
    trusted.minimum_version = ssl.TLSVersion.TLSv1_2
    trusted.set_ciphers("ECDHE-RSA-AES128-SHA")  # CBC
    assert cipher() == "ECDHE-RSA-AES128-SHA"


def test_metrics_of_both_sides_of_a_query_have_the_same_labels(running: Copy) -> None:
    running.run(block_with("key="))
    address = f"https://127.0.0.1:{running.ports['8445']}/metrics"
    text = running.run(f"curl -sS --cacert config/tls/certificate.pem {address}").stdout
    labels: dict[str, set[str]] = {}
    for name, inside in re.findall(r"^(\w+)\{(.*?)\}", text, re.M):
        labels.setdefault(name, set()).add(inside)
    pairs = re.findall(r"rate\((\w+)\[\w+\]\) / rate\((\w+)\[", MONITORING)
    assert len(pairs) >= 5
    for above, below in pairs:
        if above == "EnsembleAbstentions":  # a metric appears with its first value, and nothing abstained here
            continue
        assert labels[above] == labels[below], (above, below)
