"""Turns a .mar into the certainty that its own handler loads it and answers, without Java."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from rich.console import Console

from vmap_ensemble.errors import ArchiveError

CHILD = Path(__file__).with_name("check_child.py")
CHECK_TIMEOUT_S = 900
DETAIL_WIDTH = 400


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
        count = _unpack(path, folder)
        _print_phase(console, "unpack", time.perf_counter() - start, f"{count} files")
        _run_child(path, folder, request, console, debug)


def _unpack(path: Path, folder: Path) -> int:
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            # Extraction checks the CRC of every file as it reads it.
            archive.extractall(folder)
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise ArchiveError(f"{path.name}: unpack: not a whole archive ({error})") from None
    if "MAR-INF/MANIFEST.json" not in names:
        raise ArchiveError(f"{path.name}: unpack: no MAR-INF/MANIFEST.json; no archive of TorchServe's")
    return len(names)


def _run_child(path: Path, folder: Path, request: Path | None, console: Console, debug: bool) -> None:
    reader, writer = os.pipe()
    command = [
        *(sys.executable, str(CHILD), str(folder)),
        *(str(request.absolute()) if request else "", str(writer)),
    ]
    # A caller's PYTHONPATH comes before the archive in a worker too; here it would hide what is missing.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryFile(mode="w+") as log:
        child = subprocess.Popen(command, env=environment, pass_fds=(writer,), stdout=log, stderr=subprocess.STDOUT)
        os.close(writer)
        # Ends the pipe too, so that a handler that hangs is reported as a process that was killed.
        alarm = threading.Timer(CHECK_TIMEOUT_S, child.kill)
        alarm.start()
        try:
            error = _read_phases(reader, console)
            code = child.wait()
        finally:
            alarm.cancel()
            child.kill()
            child.wait()
        if code != 0 or error:
            log.seek(0)
            text = log.read().strip()
            if debug:
                console.print(text, markup=False, highlight=False)
            last = (text.splitlines() or ["no output"])[-1]
            raise ArchiveError(f"{path.name}: {error or f'the process ended with {code}: {last}'}")


def _read_phases(reader: int, console: Console) -> str:
    """Print phases as they end; returns the error line, if any."""
    with os.fdopen(reader) as lines:
        for line in lines:
            row = json.loads(line)
            if "error" in row:
                return str(row["error"])
            _print_phase(console, row["phase"], row["seconds"], row["detail"])
    return ""


def _print_phase(console: Console, phase: str, seconds: float, detail: str) -> None:
    short = detail if len(detail) <= DETAIL_WIDTH else detail[: DETAIL_WIDTH - 1] + "…"
    console.print(f"{phase:<14}{seconds:8.3f} s  {short}", markup=False, highlight=False, soft_wrap=True)
