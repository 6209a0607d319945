"""Turns an unpacked archive into one answered request, in a process of its own, as a worker would.

Started by archiver.check as a script: besides installed packages only the archive's own code is imported.
Each finished phase is written to the pipe as one JSON line {"phase", "seconds", "detail"} or {"error"}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main(folder: Path, request_file: str, threads: int, budget_s: float | None, pipe: Any) -> int:
    """Run the phases in order; 0 when all passed."""
    # A worker's path: the unpacked archive comes first, this script's folder isn't there.
    sys.path[0] = str(folder)
    os.chdir(folder)

    def tell(phase: str, start: float, detail: str = "") -> None:
        tell_row(pipe, phase=phase, seconds=time.perf_counter() - start, detail=detail)

    phase = "import"
    try:
        start = time.perf_counter()
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        kind = find_task(manifest["model"]["handler"])
        tell(phase, start, kind.__name__)
        phase, start = "members", time.perf_counter()
        tell(phase, start, check_members(folder))
        phase = "load"
        ensemble = load(kind, folder, manifest, threads, budget_s)
        for key, seconds in ensemble.timed.seconds.items():
            tell_row(pipe, phase=key, seconds=seconds, detail=show_detail(ensemble, key))
        phase, start = "request", time.perf_counter()
        tell(phase, start, ask(ensemble, request_file))
    except Exception as error:
        traceback.print_exc()
        tell_row(pipe, error=f"{phase}: {type(error).__name__}: {first_line(error)}")
        return 1
    return 0


def tell_row(pipe: Any, **row: Any) -> None:
    """One JSON line, at once."""
    pipe.write(json.dumps(row) + "\n")
    pipe.flush()


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def find_task(file: str) -> Any:
    """Import the handler file as TorchServe does, and find its one class."""
    module = importlib.import_module(Path(file).stem)
    return importlib.import_module("vmap_ensemble.tasks.register").task_in(module, file)


def check_members(folder: Path) -> str:
    """Count the members' files and compare their SHA-256."""
    members = importlib.import_module("vmap_ensemble.archive.manifest")
    manifest = members.read_manifest(folder)
    members.check_hashes(folder, manifest)
    return ", ".join(member.name for member in manifest.members)


def load(kind: Any, folder: Path, manifest: dict[str, Any], threads: int, budget_s: float | None) -> Any:
    """The ensemble as a worker loads it, with what its model-config yaml says, and a budget of the caller's own."""
    import torch

    ensemble = importlib.import_module("vmap_ensemble.ensemble")
    starting = importlib.import_module("vmap_ensemble.starting")
    settings = importlib.import_module("vmap_ensemble.archive.settings")
    phases = importlib.import_module("vmap_ensemble.process.phases")
    device = importlib.import_module("vmap_ensemble.process.device")
    config = read_config(folder, manifest)
    timed = phases.Phases()
    with timed(phases.SETTINGS):
        known = settings.load_settings(folder, kind.settings_class, config.get("handler"))
        gpu = 0 if torch.cuda.is_available() else None
        if budget_s is not None:
            known = settings.override_settings(known, {"execution_budget_s": budget_s})
        threads = known.threads or threads
        device.configure_torch(threads, known.float32_matmul_precision)
        place = starting.make_place(known, folder, threads, gpu)
    with timed(phases.BUILD):
        task = kind(known, place)
    return ensemble.Ensemble.start(task, timed, [int(config.get("batchSize") or 1)])


def read_config(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The model-config yaml that the manifest names; empty where there is none."""
    name = manifest["model"].get("configFile")
    if not name:
        return {}
    import yaml

    return yaml.safe_load((folder / name).read_text(encoding="utf-8")) or {}


def show_detail(ensemble: Any, phase: str) -> str:
    """What is worth a glance about a phase of loading."""
    if phase == "equivalence":
        return json.dumps(vars(ensemble.proof), default=str)
    if phase == "execution":
        return f"{ensemble.execution.name}: {ensemble.execution.reason}"
    return str(ensemble.task.place.device) if phase == "stack" else ""


def ask(ensemble: Any, request_file: str) -> str:
    """Answer one request, as a server would: its status must be 200."""
    batch = importlib.import_module("vmap_ensemble.serving.batch")
    body = Path(request_file).read_bytes() if request_file else ensemble.task.sample_request()
    # Where a request must name members it names the first that has a weight.
    heard = [name for name, (weight,) in zip(ensemble.names, ensemble.member_weights.tolist(), strict=True) if weight]
    headers = {"X-Ensemble-Subset": heard[0]} if ensemble.settings.require_subset else {}
    (reply,) = batch.answer_batch(ensemble, [batch.Incoming({"body": body}, headers)])
    if reply.status != 200:
        raise ValueError(f"the request got status {reply.status}: {reply.text}")
    return str(reply.text)


if __name__ == "__main__":
    _, folder_, request_, threads_, budget_, descriptor_ = sys.argv
    with os.fdopen(int(descriptor_), "w") as pipe_:
        sys.exit(main(Path(folder_), request_, int(threads_), float(budget_) if budget_ else None, pipe_))
