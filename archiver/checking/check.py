"""Turns a .mar into the certainty that its own handler loads it and answers, without Java."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from archiver.blocks.worker_config import describe_worker, read_worker_config
from vmap_ensemble.archive.identity import DESCRIPTION
from vmap_ensemble.archive.modes import CHOICES_FOLDER
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.execution.choice_cache import MOST_MEASUREMENTS
from vmap_ensemble.process.threads import cores_at_hand, threads_per_worker

CHILD = Path(__file__).with_name("check_child.py")
CHECK_TIMEOUT_S = 900
DETAIL_WIDTH = 400
# Of `--tune`: long enough to measure every member of a large ensemble; below what `auto` wants to be left before it
# compiles or exports (COMPILE_NEEDS_S, EXPORT_NEEDS_S), which each start would have to do again.
TUNE_BUDGET_S = 55.0


def check_archive(path: Path, request: Path | None, console: Console, debug: bool = False) -> None:
    """Unpack an archive, run its handler in a fresh process, and print each phase with its time.

    Args:
        path: The .mar.
        request: File whose bytes are the body of one request; the handler's sample when None.
        console: Where the phases are printed.
        debug: Print the handler's log and traceback when something fails.

    Raises:
        ArchiveError: One line that says in which phase what is broken.
    """
    if request is not None and not request.is_file():
        raise ArchiveError(f"{request}: no such file")
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        folder = Path(name) / "archive"
        start = time.perf_counter()
        count = unpack(path, folder)
        _print_phase(console, "unpack", time.perf_counter() - start, f"{count} files")
        _print_phase(console, "serving", 0.0, _describe_worker(folder))

        def tell(row: dict[str, Any]) -> None:
            _print_phase(console, row["phase"], row["seconds"], row["detail"])

        _run_child(path.name, folder, request, tell, console if debug else None)


def unpack(path: Path, folder: Path) -> int:
    """Extract an archive; the number of its files.

    Raises:
        ArchiveError: There is none, or it isn't whole.
    """
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            # Extraction checks the CRC of every file as it reads it.
            archive.extractall(folder)
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise ArchiveError(f"{path.name}: unpack: not a whole archive ({error})") from None
    if DESCRIPTION not in names:
        raise ArchiveError(f"{path.name}: unpack: no {DESCRIPTION}; no archive of TorchServe's")
    return len(names)


def _describe_worker(folder: Path) -> str:
    """How requests are batched: of an archive without a file of its own by TorchServe's defaults."""
    config = _worker_config(folder)
    return "" if config is None else describe_worker(config)


def _worker_config(folder: Path) -> dict[str, Any] | None:
    """What the model-config yaml says; None where the archive is broken, as the next phase says."""
    try:
        manifest = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name = manifest["model"].get("configFile")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return read_worker_config(folder / name, name) if name else {}


def load_stage(name: str, stage: Path, debug: Console | None = None, *, budget_s: float | None = None) -> str:
    """Load what becomes an archive once, as a worker will, and keep in it how its forward is run fastest here.

    Args:
        name: What errors call it.
        stage: Its root. Choices of other kinds of machine stay in it.
        debug: Where the log of a failure is printed.
        budget_s: Instead of the settings' `execution_budget_s`. What a busy machine measured is then measured once
            more, so that no worker needs to.

    Returns:
        One line: how it is run, and why.

    Raises:
        ArchiveError: No worker could load it: one line that says why.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="load-") as cache:
        choices = Path(cache) / "vmap-ensemble" / "execution"
        for _ in range(1 if budget_s is None else MOST_MEASUREMENTS):
            found.clear()
            _run_child(name, stage, None, found.append, debug, {"XDG_CACHE_HOME": cache}, budget_s)
            if all(json.loads(path.read_text())["settled"] for path in choices.glob("*.json")):
                break
        if any(choices.glob("*.json")):
            shutil.copytree(choices, stage / CHOICES_FOLDER, dirs_exist_ok=True)
    return next((str(row["detail"]) for row in found if row["phase"] == "execution"), "")


def _run_child(
    name: str,
    folder: Path,
    request: Path | None,
    tell: Callable[[dict[str, Any]], None],
    debug: Console | None,
    variables: Mapping[str, str] | None = None,
    budget_s: float | None = None,
) -> None:
    reader, writer = os.pipe()
    threads = threads_per_worker(_worker_config(folder), cores_at_hand())
    command = [
        *(sys.executable, str(CHILD), str(folder.absolute())),  # it works in there
        *(str(request.absolute()) if request else "", str(threads), str(budget_s or ""), str(writer)),
    ]
    # A caller's PYTHONPATH comes before the archive in a worker too; here it would hide what is missing.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", **(variables or {})}
    with tempfile.TemporaryFile(mode="w+") as log:
        child = subprocess.Popen(command, env=environment, pass_fds=(writer,), stdout=log, stderr=subprocess.STDOUT)
        os.close(writer)
        # Ends the pipe too, so that a handler that hangs is reported as a process that was killed.
        alarm = threading.Timer(CHECK_TIMEOUT_S, child.kill)
        alarm.start()
        try:
            error = _read_phases(reader, tell)
            code = child.wait()
        finally:
            alarm.cancel()
            child.kill()
            child.wait()
        if code != 0 or error:
            log.seek(0)
            text = log.read().strip()
            if debug is not None:
                debug.print(text, markup=False, highlight=False)
            last = (text.splitlines() or ["no output"])[-1]
            raise ArchiveError(f"{name}: {error or f'the process ended with {code}: {last}'}")


def _read_phases(reader: int, tell: Callable[[dict[str, Any]], None]) -> str:
    """Tell of phases as they end; returns the error line, if any."""
    with os.fdopen(reader) as lines:
        for line in lines:
            row = json.loads(line)
            if "error" in row:
                return str(row["error"])
            tell(row)
    return ""


def _print_phase(console: Console, phase: str, seconds: float, detail: str) -> None:
    short = detail if len(detail) <= DETAIL_WIDTH else detail[: DETAIL_WIDTH - 1] + "…"
    console.print(f"{phase:<14}{seconds:8.3f} s  {short}", markup=False, highlight=False, soft_wrap=True)
