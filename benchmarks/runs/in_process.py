"""Archives in this process -> rows of what a batch costs, inside the forward and around it."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory

from benchmarks.measuring.measure import describe_machine, describe_versions, write_json
from benchmarks.serve.archives import (
    CLASSES,
    ROOT,
    SUBJECTS,
    Subject,
    loop_probabilities,
    pack_ours,
    pack_stock,
    write_members,
)
from scripts.private_torchserve import add_archive
from vmap_ensemble.execution.timing import PAUSE_S

TOLERANCE = 1e-4  # absolute, of a probability


class Served:
    """One archive in this process, asked as TorchServe's worker asks it.

    Args:
        archive: A .mar file.
        folder: Where to unpack it.
        threads: Torch threads.
        options: Further keys of the section handler of the model-config yaml.
    """

    def __init__(self, archive: Path, folder: Path, threads: int, options: dict[str, Any]) -> None:
        edited = folder.parent / f"{folder.name}.mar"
        add_archive(archive, edited, {"batchSize": 8, "handler": {"threads": threads, **options}})
        with zipfile.ZipFile(edited) as file:
            file.extractall(folder)
        self.cache = MetricsCacheYamlImpl(str(ROOT / "config" / "metrics.yaml"))
        self.cache.initialize_cache()
        self.cache.model_name = "ens"
        sys.path.insert(0, str(folder))
        loader = ModelLoaderFactory.get_model_loader()
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
        self.service = loader.load("ens", str(folder), manifest["model"]["handler"], None, 8, None, True, self.cache)
        sys.path.remove(str(folder))
        self.service.set_cl_socket(None)
        self.handler = self.service._entry_point.__self__
        self.forward_s = 0.0

    def time_forward(self) -> None:
        """From now on add up the seconds inside the networks."""
        owner, name = (
            (self.handler.ensemble, "run") if hasattr(self.handler, "ensemble") else (self.handler, "inference")
        )
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.forward_s += time.perf_counter() - started

        setattr(owner, name, timed)

    def ask(self, bodies: list[bytes]) -> bytes:
        """The message that answers a batch."""
        name = "content-type"
        batch = [
            {
                "requestId": b"5a9c5a1e-8d53-4b0c-9a6b-0d7a0e6f8f35",
                "headers": [{"name": name.encode(), "value": b"application/octet-stream"}],
                "parameters": [{"name": "body", "value": bytearray(body), "contentType": "application/octet-stream"}],
            }
            for body in bodies
        ]
        return bytes(self.service.predict(batch))

    def probabilities(self, body: bytes) -> list[float]:
        """The answer to one picture: the JSON object in the message, ours or {class: probability}."""
        message = self.ask([body]).decode("utf-8", "replace")
        answer, _ = json.JSONDecoder().raw_decode(message, message.index("{"))
        if "top_k" in answer:
            answer = {str(row["index"]): row["probability"] for row in answer["top_k"]}
        return [answer[str(index)] for index in range(CLASSES)]


@contextmanager
def quiet_log() -> Iterator[None]:
    """What a worker logs is formatted and written, but to nowhere."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    with open(os.devnull, "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.handlers = [handler]
        root.setLevel(logging.INFO)
        yield
        root.handlers = before
        root.setLevel(level)


def load_rivals(
    subject: Subject, files: list[Path], scratch: Path, threads: int, execution: str = "auto"
) -> dict[str, Served]:
    """The looping handler and ours, with the same members."""
    folders = {name: scratch / f"{name}-packed" for name in ("loop", "ours")}
    for folder in folders.values():
        folder.mkdir()
    loop = pack_stock(subject, "ens", "loop.py", files[0], folders["loop"], tuple(files[1:]))
    ours = pack_ours(subject, files, folders["ours"], execution)
    return {
        "loop": Served(loop, scratch / "loop", threads, {"input": subject.input}),
        "ours": Served(ours, scratch / "ours", threads, {}),
    }


def measure(
    rivals: dict[str, Served], bodies: list[bytes], rounds: int, calls: int = 10
) -> dict[str, dict[str, Any]]:
    """Microseconds of one batch of each rival: all of it, in the forward, and the rest."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for round_ in range(rounds + 2):
        for name in itertools.islice(itertools.cycle(rivals), round_ % 2, round_ % 2 + len(rivals)):
            rival = rivals[name]
            time.sleep(PAUSE_S)
            rival.ask(bodies)
            for _ in range(calls):
                rival.forward_s = 0.0
                started = time.perf_counter()
                rival.ask(bodies)
                total = time.perf_counter() - started
                if round_ >= 2:
                    times[name].append((1e6 * total, 1e6 * rival.forward_s))
    return {name: summarise(spans) for name, spans in times.items()}


def summarise(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Medians in microseconds, and the ninth decile of the whole."""
    return {
        "total_us": statistics.median(total for total, _ in spans),
        "p90_us": statistics.quantiles((total for total, _ in spans), n=10)[-1],
        "forward_us": statistics.median(forward for _, forward in spans),
        "around_us": statistics.median(total - forward for total, forward in spans),
    }


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    subject = SUBJECTS[options.handler]
    bodies = subject.read_bodies()
    threads = options.threads or len(os.sched_getaffinity(0))
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("torchserve")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, quiet_log():
        os.environ["XDG_CACHE_HOME"] = scratch
        files = write_members(subject, options.members, Path(scratch))
        want = loop_probabilities(subject, files, bodies)
        rivals = load_rivals(subject, files, Path(scratch), threads, options.execution)
        for name, rival in rivals.items():
            difference = float((torch.tensor([rival.probabilities(body) for body in bodies]) - want).abs().max())
            print(f"{name}: probabilities differ by {difference:.0e}")
            if difference > TOLERANCE:
                print(f"error: {name} differs from the loop by {difference:.1e}", file=sys.stderr)
                return 1
            rival.time_forward()
        for size in options.batch:
            batch = list(itertools.islice(itertools.cycle(bodies), size))
            for name, row in measure(rivals, batch, options.rounds).items():
                rows.append({"rival": name, "batch": size, **row})
                print("  ".join(f"{k} {v:8.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key != "json"}
        write_json(options.json, machine, [], table="in_process", setting=setting, rows=rows)
    return 0
