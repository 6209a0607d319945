"""Turns an unpacked archive into one answered request, in a process of its own, as a worker would.

Started by archiver.check as a script: besides installed packages only the archive's own code is imported.
Each finished phase is written to the pipe as one JSON line {"phase", "seconds", "detail"} or {"error"}.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# What initialize() measures itself (VmapEnsembleHandler.phases_s) -> what a person calls it.
LOAD_PHASES = ("settings", "build", "stack", "prepare", "quantise", "equivalence", "first_forward")


def main(folder: Path, name: str, metrics_file: str, request_file: str, pipe: Any) -> int:
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
        handler = find_handler(manifest["model"]["handler"])
        tell(phase, start, type(handler).__name__)
        phase, start = "members", time.perf_counter()
        tell(phase, start, check_members(folder))
        phase = "load"
        context = make_context(folder, name, manifest, metrics_file)
        handler.initialize(context)
        for key in LOAD_PHASES:
            if key in handler.phases_s:
                tell_row(pipe, phase=key, seconds=handler.phases_s[key], detail=show_detail(handler, key))
        phase, start = "request", time.perf_counter()
        tell(phase, start, ask(handler, context, request_file))
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


def find_handler(file: str) -> Any:
    """Import the handler file as TorchServe does and make an instance of its one class."""
    module = importlib.import_module(Path(file).stem)
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    if len(own) != 1:
        raise TypeError(f"{file}: expected exactly one class, got {len(own)}")
    return own[0]()


def check_members(folder: Path) -> str:
    """Count the members' files and compare their SHA-256."""
    members = importlib.import_module("vmap_ensemble.core.members")
    manifest = members.read_manifest(folder)
    members.check_hashes(folder, manifest)
    return ", ".join(member.name for member in manifest.members)


def make_context(folder: Path, name: str, manifest: dict[str, Any], metrics_file: str) -> Any:
    """A real TorchServe context, with the metrics and the model-config yaml a worker would get."""
    import torch
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.service import Service

    metrics = MetricsCacheYamlImpl(config_file_path=metrics_file)
    metrics.initialize_cache()
    metrics.model_name = name
    gpu = 0 if torch.cuda.is_available() else None
    service = Service(name, str(folder), manifest, lambda data, context: None, gpu, 1, True, metrics)
    return service.context


def show_detail(handler: Any, phase: str) -> str:
    """What is worth a glance about a phase of loading."""
    if phase == "equivalence":
        return json.dumps(vars(handler.proof), default=str)
    return str(handler.device) if phase == "stack" else ""


def ask(handler: Any, context: Any, request_file: str) -> str:
    """Send one request through handle() and return its answer, which must have status 200."""
    from ts.context import RequestProcessor

    body = Path(request_file).read_bytes() if request_file else sample_body(handler)
    context.request_ids = {0: "check"}
    if context.metrics is not None:
        context.metrics.request_ids = context.request_ids
    context.request_processor = [RequestProcessor({})]
    (answer,) = handler.handle([{"body": body}], context)
    status, _ = context.get_response_status(0)
    if status != 200:
        raise ValueError(f"the request got status {status}: {answer}")
    return answer if isinstance(answer, str) else repr(answer)


def sample_body(handler: Any) -> bytes:
    """The handler's own sample request, or the noise that its equivalence is proved on, as JSON lists."""
    if hasattr(handler, "sample_request"):
        return handler.sample_request()
    (example,) = handler.sample_examples(1)
    return json.dumps(example.tolist()).encode()


if __name__ == "__main__":
    _, folder_, name_, metrics_, request_, descriptor_ = sys.argv
    with os.fdopen(int(descriptor_), "w") as pipe_:
        sys.exit(main(Path(folder_), name_, metrics_, request_, pipe_))
