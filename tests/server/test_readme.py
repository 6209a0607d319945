"""The README's commands, run as they stand in a copy of the repository; only the ports are others."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from torchvision.models import resnet18

from scripts.private_torchserve import ROOT, free_ports

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
PORTS = ("8080", "8081", "8082", "7070", "7071")


@dataclass
class Copy:
    """A copy of the repository with ports of its own."""

    folder: Path
    ports: dict[str, str]
    environment: dict[str, str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        for old, new in self.ports.items():
            command = command.replace(f":{old}", f":{new}")
        shell = ["bash", "-ec", command]
        return subprocess.run(
            shell, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240
        )


def commands_with(text: str) -> list[str]:
    """The README's command lines that hold `text`, without their comments."""
    lines = [line for block in BLOCKS for line in block.splitlines() if text in line]
    assert lines, f"the README has no command with {text!r}"
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def copy_repository(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    folder = tmp_path_factory.mktemp("clone")
    copy_repository(folder)
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    config = folder / "config" / "config.properties"
    text = config.read_text(encoding="utf-8")
    for old, new in ports.items():
        text = re.sub(rf"(?<=[:=]){old}$", new, text, flags=re.MULTILINE)
    config.write_text(text, encoding="utf-8")
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), folder / f"{name}.pth")
    temporary = tmp_path_factory.mktemp("tmp")
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(temporary), "TEMP": str(temporary)}
    return Copy(folder, ports, environment)


@pytest.fixture(scope="module")
def serving(copy: Copy) -> Iterator[Copy]:
    (build,) = commands_with("--members a.pth")
    built = copy.run(build)
    assert built.returncode == 0, built.stdout + built.stderr
    (start,) = commands_with("torchserve --start")
    started = copy.run(start + " > torchserve.log 2>&1")
    try:
        assert started.returncode == 0, started.stderr
        wait_until_ready(f"http://127.0.0.1:{copy.ports['8081']}/models/ens")
        yield copy
    finally:
        copy.run("torchserve --stop")


def wait_until_ready(url: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                workers = client.get(url).json()[0]["workers"]
                if workers and all(worker["status"] == "READY" for worker in workers):
                    return
            except (httpx.TransportError, KeyError, IndexError, TypeError):
                pass
            time.sleep(0.5)
    raise AssertionError(f"no worker is READY at {url} after {timeout_s} s")


def test_every_curl_line_is_answered(serving: Copy) -> None:
    for command in commands_with("curl -T"):
        done = serving.run(command)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert 0 < answer["prediction"]["probability"] <= 1, (command, answer)
        if "Detail" in command:
            assert [row["name"] for row in answer["members"]] == ["a", "b", "c"]
        if "Subset" in command:
            assert answer["ensemble"]["subset"] == ["a", "c"]
        if "Top-K" in command:
            assert len(answer["top_k"]) == 3


def test_a_bad_request_gets_its_own_answer(serving: Copy) -> None:
    url = f"http://127.0.0.1:{serving.ports['8080']}/predictions/ens"
    with httpx.Client(trust_env=False, timeout=60) as client:
        assert client.put(url, content=io.BytesIO(b"no image").getvalue()).status_code == 415


def test_the_check_of_an_archive_runs_as_written(serving: Copy) -> None:
    command = re.search(r"`(\./archive\.sh --check[^`]*)`", README.replace("\n", " "))
    assert command is not None
    done = serving.run(command.group(1))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equivalence" in done.stdout


@pytest.mark.parametrize("command", commands_with("python -m benchmarks"))
def test_benchmarks_run_as_written(copy: Copy, command: str) -> None:
    # As written they count 1000 runs, or load 8 members; a test has time for a few.
    short = " --runs 1 --members 2" if "loading" in command else " --warmup 1 --iterations 3"
    done = copy.run(command + short)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_link_of_the_readme_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
