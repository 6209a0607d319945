"""Turns an unpacked archive into the seconds that a real TorchServe needs until its worker is READY, by phase.

jvm        start of the server until it begins to unpack
unzip      first until last file of the archive
launch     until the worker's process begins
import …   what the handler itself measures (VmapEnsembleHandler.phases_s)
answer     until the management API says READY; it is asked five times a second
"""

from __future__ import annotations

import json
import os
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil

from scripts.private_torchserve import ROOT, TorchServe
from vmap_ensemble.process.age import seconds_since_process_start

WORKER_CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: {batch}\nmaxBatchDelay: 5\nresponseTimeout: 120\n"
MANIFEST = {
    "createdOn": "01/01/2026 00:00:00",
    "runtime": "python",
    "model": {
        "modelName": "ens",
        "handler": "resnet_handler.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    },
    "archiverVersion": "0.12.0",
}


def pack_folder(folder: Path, target: Path, batch: int, handlers: Path = ROOT / "handlers") -> Path:
    """Write an unpacked archive and the handler's code as a .mar, stored as ./archive.sh does."""
    code = [handlers / "resnet_handler.py", *sorted((handlers / "vmap_ensemble").rglob("*.py"))]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
        archive.writestr("model-config.yaml", WORKER_CONFIG.format(batch=batch))
        for path in code:
            archive.write(path, path.relative_to(handlers))
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def serve_once(archive: Path, cache: Path) -> dict[str, Any]:
    """Start a server on the archive and return its seconds by phase, in order, and what serves.

    Args:
        archive: A .mar whose handler is ours.
        cache: Where the worker keeps the choice of `auto`; an earlier start's choice is used.
    """
    os.environ["XDG_CACHE_HOME"] = str(cache)  # handed on to the worker
    server = TorchServe({"ens": archive}, timeout_s=600)
    started = time.time()
    with server:
        ready = time.time()
        (worker,) = [
            process
            for process in psutil.Process(server.pid).children(recursive=True)
            if "model_service_worker.py" in " ".join(process.cmdline())
        ]
        told = _read_summary(server.logs())
        worker_started = time.time() - seconds_since_process_start(worker.pid)
        phases = _phases(server.launch.temp_dir, started, worker_started, told["load_s"])
    phases["answer"] = ready - started - sum(phases.values())
    serves = told["execution"]
    if isinstance(serves, str):  # versions that measured nothing told the mode alone
        serves = {"serves": serves, "reason": "asked for"}
    return {"phases_s": phases, "ready_s": ready - started, "serves": serves["serves"], "reason": serves["reason"]}


def _read_summary(logs: str) -> dict[str, Any]:
    """What the handler logs when it is ready."""
    (line,) = re.findall(r"ready: (\{.*\})", logs)
    summary: dict[str, Any] = json.loads(line)
    return summary


def _phases(temp: Path, started: float, worker_started: float, load_s: dict[str, float]) -> dict[str, float]:
    # The worker writes bytecode beside the code.
    files = [path for path in (temp / "models").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    unpacked = [path.stat().st_mtime for path in files]
    first, last = min(unpacked), max(unpacked)
    before = {"jvm": first - started, "unzip": last - first, "launch": worker_started - last}
    return {**before, **load_s}
