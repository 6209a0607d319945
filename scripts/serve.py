"""Turns the name of an archive into a running TorchServe that has answered one request.

What serve.sh runs once the environment is there: makes missing members, builds the archive when it is missing or
older than what it is made of, starts TorchServe in .run/serve, waits until its worker is READY and asks it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from scripts.torchserve_process import (
    MAIN_CLASS,
    Launch,
    ServerError,
    is_running,
    read_properties,
    start,
    stop,
    wait_until_ready,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config" / "config.properties"
MODEL = "ens"


@dataclass(frozen=True)
class Demo:
    """How a fresh clone gets members of an archive, what the archive is asked, and what else both need.

    Attributes:
        command: Module and arguments that make the members.
        samples: Files, as globs, that the archive may be asked about.
        groups: Requirements beyond requirements.txt (requirements-GROUP.txt).
    """

    command: tuple[str, ...]
    samples: tuple[str, ...]
    groups: tuple[str, ...] = ()


DEMOS = {
    "mnist_ens": Demo(("training.mnist", "--save-model", "--num-models", "5"), ("data/digits/*.png",)),
    "resnet_ens": Demo(("training.demo_resnet",), ("data/images/*.jpg",)),
    "bert_ens": Demo(("training.bert",), ("data/texts/*.txt",), ("bert", "demo")),
    "ft_bert_seqcls": Demo(("training.bert",), ("data/texts/*.txt",), ("bert", "demo")),
    "ft_bert_qa": Demo(("training.question_answering",), ("data/texts/*.json",), ("bert", "demo")),
}


def read_block(name: str) -> dict[str, Any]:
    """Reads the archive's block of setup_config.json.

    Raises:
        ServerError: there is no such archive; names those there are.
    """
    blocks: dict[str, Any] = json.loads((ROOT / "setup_config.json").read_text(encoding="utf-8"))
    if name not in blocks:
        raise ServerError(f"setup_config.json has no archive {name!r}: expected one of {', '.join(blocks)}")
    block: dict[str, Any] = blocks[name]
    return block


def member_patterns(block: dict[str, Any]) -> list[str]:
    """The members that a block names: paths, globs or folders; weight names such as torchvision:… are no files."""
    members = block.get("members", [])
    entries: list[Any] = list(members.values()) if isinstance(members, dict) else members
    entries = [members] if isinstance(members, str) else entries
    texts = [str(entry.get("file", "")) if isinstance(entry, dict) else str(entry) for entry in entries]
    return [text for text in texts if text and not text.startswith("torchvision:")]


def find_files(pattern: str) -> list[Path]:
    """The files of a path, a glob or a folder below the repository."""
    path = ROOT / pattern
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    return sorted(file for file in ROOT.glob(pattern) if file.is_file()) if not Path(pattern).is_absolute() else []


def ensure_requirements(name: str) -> None:
    """Installs what an archive's demonstration needs beyond requirements.txt."""
    demo = DEMOS.get(name)
    command = [str(ROOT / "scripts" / "setup.sh"), *(demo.groups if demo else ())]
    if demo and demo.groups and subprocess.run(command, check=False).returncode:
        raise ServerError(f"scripts/setup.sh {' '.join(demo.groups)} failed; see above")


def ensure_members(name: str, block: dict[str, Any]) -> None:
    """Runs the demonstration's training when a member's file is missing."""
    missing = [pattern for pattern in member_patterns(block) if not find_files(pattern)]
    demo = DEMOS.get(name)
    if demo is None:
        if missing:
            raise ServerError(f"members of {name} are missing: {', '.join(missing)} (see setup_config.json)")
        return
    # Left behind by a run that was stopped: some members are there, but not all. Archives may share members.
    unfinished = ROOT / ".run" / f"unfinished-{demo.command[0]}"
    if not missing and not unfinished.exists():
        return
    reason = f"No members at {', '.join(missing)}" if missing else "An earlier run was stopped before its end"
    print(f"{reason}: making members with python -m {' '.join(demo.command)}", flush=True)
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.touch()
    run_module(*demo.command)
    unfinished.unlink()


def run_module(*command: str) -> None:
    """Runs a module of the repository, its progress bars on our terminal."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
    if done.returncode:
        raise ServerError(f"python -m {' '.join(command)} failed with status {done.returncode}; see above")


def archive_inputs(name: str, block: dict[str, Any]) -> list[Path]:
    """Every file whose change makes the archive out of date."""
    inputs = [ROOT / "setup_config.json", ROOT / "config" / f"{name}.yaml"]
    inputs += list((ROOT / "handlers").rglob("*.py"))
    if block.get("FasterTransformer"):
        inputs += [*(ROOT / "fastertransformer").glob("*.py"), *(ROOT / "fastertransformer" / "csrc").iterdir()]
    for pattern in member_patterns(block):
        inputs += find_files(pattern)
    return [file for file in inputs if file.is_file()]


def ensure_archive(name: str, block: dict[str, Any]) -> Path:
    """Builds the archive when it is missing or older than its inputs."""
    archive = ROOT / "model_store" / f"{name}.mar"
    newest = max(file.stat().st_mtime for file in archive_inputs(name, block))
    if archive.is_file() and archive.stat().st_mtime >= newest:
        return archive
    reason = "is older than its inputs" if archive.is_file() else "is missing"
    print(f"model_store/{name}.mar {reason}: building it", flush=True)
    command = [str(ROOT / "archive.sh"), name] + (["--force"] if archive.is_file() else [])
    if subprocess.run(command, cwd=ROOT, check=False).returncode or not archive.is_file():
        raise ServerError(f"./archive.sh {name} failed; see above")
    return archive


class Progress:
    """A line that tells that something goes on: nothing for 2 s, then a counter, or a line every 15 s."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.last_s = 0.0
        self.shown = False

    def __call__(self, elapsed_s: float) -> None:
        if elapsed_s < 2:
            return
        if sys.stdout.isatty():
            bar = "#" * (int(elapsed_s * 2) % 20)
            print(f"\r{self.label} [{bar:<20}] {elapsed_s:.0f} s ", end="", flush=True)
            self.shown = True
        elif elapsed_s - self.last_s >= 15 or not self.last_s:
            print(f"  {self.label}: {elapsed_s:.0f} s", flush=True)
            self.last_s = elapsed_s

    def close(self) -> None:
        """Removes the counter from the terminal."""
        if self.shown:
            print("\r\033[K", end="", flush=True)


class Service:
    """The one TorchServe that serve.sh runs, known by .run/serve/state.json."""

    def __init__(self, run_dir: Path = ROOT / ".run" / "serve", config: Path = CONFIG) -> None:
        self.run_dir = run_dir
        self.state_file = run_dir / "state.json"
        self.config = config
        self.properties = read_properties(config)

    def state(self) -> dict[str, Any] | None:
        """What was recorded at start, if that very process still runs: pids are used again, start times are not."""
        if not self.state_file.is_file():
            return None
        state: dict[str, Any] = json.loads(self.state_file.read_text(encoding="utf-8"))
        try:
            process = psutil.Process(state["pid"])
            same = abs(process.create_time() - state["create_time_s"]) < 2 and MAIN_CLASS in process.cmdline()
        except psutil.Error:
            return None
        return state if same and is_running(process) else None

    def stop(self) -> bool:
        """Stops the recorded process and its workers; False when there is none."""
        state = self.state()
        if state is not None:
            stop(state["pid"])
        self.state_file.unlink(missing_ok=True)
        return state is not None

    def start(self, name: str, archive: Path) -> float:
        """Starts TorchServe and waits for its worker; returns the seconds that took.

        Raises:
            ServerError: it did not start; nothing is left running then.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for log in (self.run_dir / "logs").glob("*.log"):
            log.unlink()
        # Its working folder is its own, since keys are written there; the configs' relative paths still hold.
        link = self.run_dir / "config"
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / "config", self.run_dir))
        launch = Launch(self.config, archive.parent, {MODEL: archive.name}, self.run_dir, self.run_dir)
        process = start(launch)
        state = {
            "pid": process.pid,
            "create_time_s": psutil.Process(process.pid).create_time(),
            "name": name,
            "archive_mtime_s": archive.stat().st_mtime,
        }
        self.state_file.write_text(json.dumps(state), encoding="utf-8")
        progress = Progress(f"Loading {name}")
        try:
            with httpx.Client(base_url=self.properties["management_address"], trust_env=False) as client:
                took_s = wait_until_ready(launch, process, client, 600.0, progress)
        except BaseException:
            self.stop()
            raise
        finally:
            progress.close()
        return took_s

    def ask(self, name: str) -> None:
        """Sends one sample, and prints the answer and the command that asks the same.

        Raises:
            ServerError: the answer is not 200.
        """
        url = f"{self.properties['inference_address']}/predictions/{MODEL}"
        sample = find_sample(name)
        if sample is None:
            print(f"Serving {name}. Ask it with:\n  curl -T FILE {url}")
            return
        shown = sample.relative_to(ROOT)
        started = time.perf_counter()
        with httpx.Client(trust_env=False, timeout=120) as client:
            answer = client.put(url, content=sample.read_bytes())
        took_ms = (time.perf_counter() - started) * 1e3
        if answer.status_code != 200:
            raise ServerError(f"{url} answered {answer.status_code} to {shown}: {answer.text.strip()}")
        print(f"Asked about {shown}, answered in {took_ms:.0f} ms:\n{answer.text.strip()}")
        print(f"Ask again with:\n  curl -T {shown} {url}")


def find_sample(name: str) -> Path | None:
    """The file that the archive is asked about: a digit 3 where there is one."""
    demo = DEMOS.get(name)
    files = [file for pattern in (demo.samples if demo else ()) for file in find_files(pattern)]
    preferred = [file for file in files if fnmatch.fnmatch(file.name, "*3*")]
    return next(iter(preferred or files), None)


def serve(name: str, service: Service) -> None:
    """Does all that `./serve.sh NAME` promises."""
    block = read_block(name)
    ensure_requirements(name)
    ensure_members(name, block)
    archive = ensure_archive(name, block)
    running = service.state()
    if running and (running["name"], running["archive_mtime_s"]) == (name, archive.stat().st_mtime):
        print(f"Serving {name} already (pid {running['pid']})")
    else:
        if running:
            print(f"Stopping {running['name']}, which was served until now")
            service.stop()
        print(f"Starting TorchServe with {name} as `{MODEL}`", flush=True)
        print(f"READY after {service.start(name, archive):.1f} s")
    service.ask(name)
    print("It goes on serving until ./serve.sh --stop. Logs: .run/serve/logs")


def show_status(service: Service) -> bool:
    """Prints what is served; False when nothing is."""
    state = service.state()
    if state is None:
        print("Not serving")
        return False
    with httpx.Client(base_url=service.properties["management_address"], trust_env=False, timeout=10) as client:
        answer = client.get(f"/models/{MODEL}")
    workers: Iterable[dict[str, Any]] = answer.json()[0]["workers"] if answer.status_code == 200 else []
    states = ", ".join(worker["status"] for worker in workers) or "none"
    print(f"Serving {state['name']} as `{MODEL}` at {service.properties['inference_address']}, pid {state['pid']}")
    print(f"Workers: {states}")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line of serve.sh."""
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="./serve.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", default="mnist_ens", help="archive of setup_config.json (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stop", action="store_true", help="stop the TorchServe that ./serve.sh started, no other")
    what.add_argument("--status", action="store_true", help="tell what is served; status 1 when nothing is")
    options = parser.parse_args(arguments)
    # A stopped serve.sh takes its training or packing with it, and a server that is not ready yet.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    service = Service()
    try:
        if options.stop:
            print("Stopped" if service.stop() else "Nothing to stop: ./serve.sh has started nothing that runs")
            return 0
        if options.status:
            return 0 if show_status(service) else 1
        serve(options.name, service)
    except (ServerError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
