"""Rival functions -> their times, measured side by side on one machine, with that machine described."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vmap_ensemble.process.device import cpu_name

# Threads of the rival before (OpenMP's, ONNX Runtime's) spin for some 7 ms after its last call, on cores that the
# next one needs.
SETTLE_S = 0.01
# A core that has slept takes some milliseconds to its full clock and warm caches. That is several calls of a small
# network but a part of one of a large or slow one, so calls in the first milliseconds of a block aren't counted.
WAKE_S = 0.02


@dataclass(frozen=True)
class Timing:
    """Times of one rival over all its counted calls, in milliseconds.

    Attributes:
        name: of the rival.
        calls: how many were counted.
        mean_ms, median_ms, p10_ms, p90_ms: of one call.
    """

    name: str
    calls: int
    mean_ms: float
    median_ms: float
    p10_ms: float
    p90_ms: float


def use_threads(count: int | None) -> int:
    """Let torch use this number of threads, or as many as it decides itself; returns how many."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say what a figure was measured on: processor, cores, threads, accelerator and versions."""
    machine: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": _count_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
        machine["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
    return machine


def describe_versions(*packages: str) -> dict[str, str]:
    """Package -> its version, or "not installed"."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _count_cores() -> int:
    # Those that this process may use: a container often sees fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_interleaved(
    rivals: Mapping[str, Callable[[], object]],
    device: torch.device,
    warmup: int = 100,
    iterations: int = 1000,
    block: int = 20,
) -> list[Timing]:
    """Time rivals in turns, so that a busy or throttled moment of the machine hits them alike.

    Args:
        rivals: name -> a call without arguments. They run block by block in turns; each round begins with
            another rival, so that none always runs in the wake of the same one.
        device: it is waited for before and after each timed call.
        warmup: uncounted calls of each rival.
        iterations: counted calls of each rival.
        block: calls of one rival in a row that are counted. In a row, as in a server; short, so that the turns are
            many. Calls during `WAKE_S` before them aren't counted.

    Returns:
        One Timing a rival, in the order given.

    Raises:
        ValueError: no rivals, or a count that is out of range.
    """
    if not rivals or warmup < 0 or iterations < 1 or block < 1:
        raise ValueError(
            "expected a rival, warmup of 0 or more, iterations and block of 1 or more; "
            f"got {len(rivals)} rivals, warmup {warmup}, iterations {iterations}, block {block}"
        )
    times: dict[str, list[float]] = {name: [] for name in rivals}
    last_s: dict[str, float] = {}
    for phase, count in (("warm-up", warmup), ("measure", iterations)):
        with tqdm(total=count * len(rivals), desc=phase, unit="call", mininterval=0.5) as bar:
            for start in range(0, count, block):
                for name in _rotate(list(rivals), start // block):
                    time.sleep(SETTLE_S)
                    calls = min(block, count - start)
                    if phase == "measure":
                        _wake(rivals[name], device, about_s=last_s.get(name, 0.0))
                    spans = [_time_call(rivals[name], device) for _ in range(calls)]
                    last_s[name] = spans[-1] / 1e3
                    if phase == "measure":
                        times[name] += spans
                    bar.update(calls)
    return [summarise(name, spans) for name, spans in times.items()]


def _wake(call: Callable[[], object], device: torch.device, about_s: float) -> None:
    """Call for `WAKE_S`; one call that takes longer needs no other before it."""
    until = time.perf_counter() + WAKE_S
    while about_s < WAKE_S and time.perf_counter() < until:
        _time_call(call, device)


def _rotate(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def summarise(name: str, times_ms: list[float]) -> Timing:
    """Turn the times of single calls into one Timing."""
    if len(times_ms) == 1:
        p10 = p90 = times_ms[0]
    else:
        deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
        p10, p90 = deciles[0], deciles[-1]
    return Timing(
        name, len(times_ms), statistics.fmean(times_ms), statistics.median(times_ms), p10_ms=p10, p90_ms=p90
    )


def print_timings(timings: list[Timing]) -> None:
    """Print the rivals below one another; the first is the baseline of the ratios of medians."""
    width = max(len(timing.name) for timing in timings)
    print(f"{'':{width}}  {'mean':>9}  {'median':>9}  {'p10':>9}  {'p90':>9}   ratio of medians")
    for t in timings:
        cells = "  ".join(f"{value:6.3f} ms" for value in (t.mean_ms, t.median_ms, t.p10_ms, t.p90_ms))
        print(f"{t.name:{width}}  {cells}   {timings[0].median_ms / t.median_ms:.2f}x")


def make_session(model: bytes | str, threads: int) -> Any:
    """An ONNX Runtime session on the CPU with all optimisations, whose threads stop spinning at the end of a run.

    Args:
        model: A serialised ONNX model, or the path of one.
        threads: To compute with, as many as its rivals have.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Within a run they spin, which is ORT's fastest; after it they would take the next rival's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def write_json(path: Path, machine: dict[str, Any], timings: list[Timing], **facts: Any) -> None:
    """Write a benchmark's figures, with the machine, and with whatever else the benchmark found out."""
    figures = {"machine": machine, **facts, "timings": [asdict(timing) for timing in timings]}
    path.write_text(json.dumps(figures, indent=2) + "\n")
