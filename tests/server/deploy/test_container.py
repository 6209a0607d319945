"""deploy/Dockerfile without Docker: its cheap steps run in an environment of their own, its command serves there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from scripts.private_torchserve import ROOT, free_ports

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
PORTS = ("8080", "8081", "8082", "7070", "7071")


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


STEPS = instructions(DOCKERFILE)
BUILD = STEPS[: next(i for i, step in enumerate(STEPS) if step[0] == "FROM" and "AS serve" in step[1])]
SERVE = STEPS[len(BUILD) :]
RUNS = [rest for word, rest in STEPS if word == "RUN"]


def only(steps: list[tuple[str, str]], word: str) -> str:
    (found,) = [rest for name, rest in steps if name == word]
    return found


def variables() -> dict[str, str]:
    """What ENV of the image sets."""
    pairs = re.findall(r'(\w+)=("[^"]*"|\S+)', only(SERVE, "ENV"))
    return {key: value.strip('"') for key, value in pairs}


def copied(steps: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """(sources of the context, target) of each COPY."""
    rows = [rest.split() for word, rest in steps if word == "COPY" and not rest.startswith("--from")]
    return [(row[:-1], row[-1]) for row in rows]


def test_two_stages_and_a_user_who_is_not_root() -> None:
    assert [rest.split(" AS ")[1] for word, rest in STEPS if word == "FROM"] == ["build", "serve"]
    assert int(only(SERVE, "USER")) > 0
    assert f"--uid {only(SERVE, 'USER')} " in RUNS[-1]
    assert "vmap-ensemble health http" in only(SERVE, "HEALTHCHECK")
    assert json.loads(only(SERVE, "ENTRYPOINT"))[0] == "tini"
    assert " tini " in RUNS[-1]


def test_what_is_copied_is_there_and_let_through() -> None:
    allowed = {line[1:] for line in IGNORED if line.startswith("!")}
    for sources, _ in copied(STEPS):
        for source in sources:
            assert list(ROOT.glob(source)), source
            assert any(fnmatch(source, rule) or source == rule for rule in allowed), source
    assert IGNORED[1] == "*"
    assert "config/tls" in IGNORED  # the key of a certificate that somebody tried out


def test_the_shell_of_each_step_is_sound(tmp_path: Path) -> None:
    for number, step in enumerate([*RUNS, json.loads(only(SERVE, "CMD"))[2]]):
        path = tmp_path / f"{number}.sh"
        path.write_text(f"#!/bin/sh\n{step}\n")
        # Words of $index, $PROBE and $MODELS are meant to be several; they and $TEMP are set by ARG and ENV.
        done = subprocess.run(
            [Path(sys.executable).parent / "shellcheck", "-e", "SC2086,SC2154", str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_the_device_decides_on_torchs_wheels(device: str, tmp_path: Path) -> None:
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')  # a stand-in that installs nothing
    (tmp_path / "pip").chmod(0o755)
    (step,) = [run for run in RUNS if run.startswith("case")]
    arguments = {"DEVICE": device, "REQUIREMENTS": "requirements.txt", "TORCH_INDEX": "https://wheels.example/cpu"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **arguments}
    done = subprocess.run(["sh", "-ec", step], env=environment, capture_output=True, text=True)
    if device == "tpu":
        assert done.returncode == 2
        assert done.stderr == "DEVICE: expected cpu or cuda, got tpu\n"
        return
    assert done.stdout.endswith("-c constraints.txt -r requirements.txt\n")
    assert ("/cpu" in done.stdout) == (device == "cpu")
    usual = subprocess.run(
        ["sh", "-ec", step], env={**environment, "TORCH_INDEX": ""}, capture_output=True, text=True
    )
    assert usual.stdout == "install -c constraints.txt -r requirements.txt\n"


@dataclass
class Image:
    """What the image would hold, below a folder: /src, /opt/ensemble, /srv/ensemble, /models and /var/ensemble."""

    root: Path
    ports: dict[str, str]

    def path(self, text: str) -> str:
        """A command or value with the image's folders and ports replaced."""
        text = re.sub(r"(?<![\w.])/(src|opt|srv|models|var)\b", rf"{self.root}/\1", text)
        for old, new in self.ports.items():
            text = re.sub(rf"(?<=:){old}\b", new, text)
        return text

    def environment(self) -> dict[str, str]:
        own = {key: self.path(value) for key, value in variables().items() if key != "PATH"}
        path = f"{self.root}/opt/ensemble/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.root), **own}

    def run(self, step: str, folder: str) -> None:
        command = ["sh", "-ec", self.path(step)]
        where = self.root / folder
        done = subprocess.run(command, cwd=where, env=self.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def copy(self, steps: list[tuple[str, str]], folder: str) -> None:
        for sources, target in copied(steps):
            place = self.root / folder / self.path(target)
            for source in (path for name in sources for path in ROOT.glob(name)):
                to = place / source.name if target.endswith("/") else place
                to.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "tls", "*.so"))
                else:
                    shutil.copy(source, to)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Both stages, but for what is downloaded: the packages are those of this environment."""
    made = Image(tmp_path_factory.mktemp("i"), dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True)))
    for folder in ("src", "opt", "srv", "models", "var/ensemble"):
        (made.root / folder).mkdir(parents=True)
    environment, java, project = (next(run for run in RUNS if part in run) for part in ("venv", "ln -s", "--no-deps"))
    made.run(environment.replace("venv ", "venv --without-pip "), "src")
    site = sysconfig.get_paths(vars={"base": f"{made.root}/opt/ensemble"})["purelib"]
    (Path(site) / "packages.pth").write_text(sysconfig.get_paths()["purelib"])
    made.run(java, "src")
    made.copy(BUILD, "src")
    offline = "python -m pip install --ignore-installed --no-build-isolation"
    made.run(project.replace("pip install", offline), "src")
    made.copy(SERVE, "srv")
    return made


@pytest.fixture(scope="module")
def container(image: Image, ok_archive: Path) -> Iterator[Image]:
    """The image's command, with an archive in /models under the name that MODELS has."""
    properties = image.root / "srv" / "ensemble" / "config" / "container.properties"
    text = properties.read_text().replace("0.0.0.0", "127.0.0.1")
    for old, new in image.ports.items():
        text = re.sub(rf"(?<=[:=]){old}$", new, text, flags=re.M)
    properties.write_text(text)
    shutil.copy(ok_archive, image.root / "models" / variables()["MODELS"].partition("=")[2])
    command = [image.path(word) for word in json.loads(only(SERVE, "CMD"))]
    with (image.root / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=image.path(only(SERVE, "WORKDIR")),
            env=image.environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield image
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # as tini -g does
        process.wait(timeout=30)


def test_the_command_serves_and_the_health_check_is_a_prediction(container: Image) -> None:
    _, _, asked = only(SERVE, "HEALTHCHECK").partition("CMD ")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sh", "-c", container.path(asked)], env=container.environment(), capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        time.sleep(0.5)
    assert done.stdout.startswith("healthy: "), done.stderr + (container.root / "log").read_text()[-2000:]
    assert (container.root / "opt" / "ensemble" / "bin" / "vmap-ensemble").is_file()


def test_nothing_is_written_outside_of_the_state_folder(container: Image) -> None:
    place = container.root / "srv" / "ensemble"
    shipped = {path.name for path in (ROOT / "config").iterdir() if path.name != "tls"}
    assert {path.name for path in place.iterdir()} == {"config", "probe.png"}
    assert {path.name for path in (place / "config").iterdir()} == shipped
    assert {path.name for path in (container.root / "var" / "ensemble").iterdir()} >= {"logs", "tmp"}
