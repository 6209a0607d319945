"""A network and sizes of the ensemble -> times, memory and their fitted lines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.measure import (
    Timing,
    describe_machine,
    describe_versions,
    measure_interleaved,
    use_threads,
    write_json,
)
from benchmarks.measuring.networks import NETWORKS, Network, build_members, to_tensor
from benchmarks.measuring.rivals import Call, Rivals
from benchmarks.options import ROOT
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.modes import ExecutionOptions

TOLERANCE = 1e-4  # relative to the loop's largest output
DEFAULT_MEMBERS = (1, 2, 4, 8, 16)


def fit_line(x: list[int], y: list[float]) -> dict[str, float]:
    """Least squares: slope, intercept, and r2, the share of the variance that the line explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    r2 = 1.0 - float(np.sum(residual**2)) / spread if spread else 1.0
    return {"slope": float(slope), "intercept": float(intercept), "r2": r2}


def build_calls(network: Network, counts: list[int], batch: int) -> tuple[dict[str, Call], list[dict[str, Any]]]:
    """Loop and ours for every size, compared; returns the calls by name and the facts of each size."""
    calls: dict[str, Call] = {}
    facts = []
    for count in counts:
        torch.manual_seed(0)
        rivals = Rivals(network, build_members(network, count), network.make_args(batch), Path())
        loop, ours = rivals.loop(), rivals.ours_auto()
        want = loop()
        difference = float((ours() - want).abs().max() / want.abs().max())
        calls |= {f"loop {count}": loop, f"ours {count}": ours}
        facts.append({
            "members": count, "stack_mib": rivals.members.size_bytes() / 2**20, "runs_as": rivals.notes["ours_auto"],
            "largest_relative_difference": difference, "equal": difference <= TOLERANCE,
        })  # fmt: skip
    return calls, facts


def measure_times(calls: dict[str, Call], seconds: float) -> dict[str, Timing]:
    """Time all calls in turns, for about so many seconds."""
    device = torch.device("cpu")
    trial = measure_interleaved(calls, device, warmup=1, iterations=2, block=2)
    round_s = 2 * sum(timing.mean_ms for timing in trial) / 1e3
    rounds = min(100, max(3, round(seconds / round_s)))
    return {t.name: t for t in measure_interleaved(calls, device, warmup=2, iterations=2 * rounds, block=2)}


def measure_memory(name: str, count: int, batch: int, mode: str, threads: int) -> dict[str, float]:
    """Resident memory in MiB of a fresh process that serves this size in this mode."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        "--child",
        name,
        str(count),
        str(batch),
        mode,
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {count} members: the process failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_child(name: str, count: int, batch: int, mode: str, threads: int) -> None:
    """Stack the members one by one, run forwards, print this process's memory before, after, and at its peak."""
    torch.set_num_threads(threads)
    network = NETWORKS[name]
    skeleton = network.build()
    args = network.make_args(batch)
    with torch.inference_mode():
        skeleton(*args)  # code is paged in when it first runs
        base_mib = _status_mib("VmRSS")
        members = stack_one_by_one(network, count)
        run = build_execution(mode, network.join(skeleton, members), [args], ExecutionOptions())
        for _ in range(3):
            to_tensor(run(*args))
    print(json.dumps({"base_mib": base_mib, "rss_mib": _status_mib("VmRSS"), "peak_mib": _status_mib("VmHWM")}))


def stack_one_by_one(network: Network, count: int) -> StackedMembers:
    """Fill preallocated stacks member by member, as a worker does: beside the stacks no more than one is held."""
    stacked: dict[str, Tensor] = {}
    for seed in range(count):
        torch.manual_seed(seed)
        for key, value in network.build().state_dict().items():
            stacked.setdefault(key, torch.empty(count, *value.shape, dtype=value.dtype))[seed] = value
    return StackedMembers(names=tuple(f"m{seed}" for seed in range(count)), stacked=stacked, shared={})


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def scale(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one network."""
    network, counts = NETWORKS[name], sorted(options.members)
    with torch.inference_mode():
        calls, rows = build_calls(network, counts, options.batch)
        timings = measure_times(calls, options.seconds)
    calls.clear()  # gives the stacks back before the child processes need memory
    for row in rows:
        count = row["members"]
        loop, ours = timings[f"loop {count}"], timings[f"ours {count}"]
        mode = row["runs_as"].split(":")[0]
        row |= measure_memory(name, count, options.batch, mode, options.threads)
        row |= {"loop": asdict(loop), "ours": asdict(ours), "ratio": loop.median_ms / ours.median_ms}
    fits = {
        "loop_ms": fit_line(counts, [row["loop"]["median_ms"] for row in rows]),
        "ours_ms": fit_line(counts, [row["ours"]["median_ms"] for row in rows]),
        "stack_mib": fit_line(counts, [row["stack_mib"] for row in rows]),
        "rss_mib": fit_line(counts, [row["rss_mib"] for row in rows]),
        "peak_mib": fit_line(counts, [row["peak_mib"] for row in rows]),
    }
    return {"model": name, "network": network.title, "batch": options.batch, "rows": rows, "fits": fits}


def print_scale(table: dict[str, Any]) -> None:
    """Print one network's figures and slopes."""
    print(f"\n{table['network']}, batch {table['batch']}")
    print(f"{'members':>7}{'loop':>13}{'ours':>13}{'p10':>9}{'p90':>9}{'ratio':>8}{'stack':>11}{'peak':>12}  runs as")
    for row in table["rows"]:
        ours = row["ours"]
        print(
            f"{row['members']:7}{row['loop']['median_ms']:10.3f} ms{ours['median_ms']:10.3f} ms{ours['p10_ms']:9.3f}"
            f"{ours['p90_ms']:9.3f}{row['ratio']:7.2f}x{row['stack_mib']:7.1f} MiB{row['peak_mib']:8.0f} MiB  "
            f"{row['runs_as'].split(':')[0]}; difference {row['largest_relative_difference']:.1e}"
        )
    fits = table["fits"]
    print(
        f"a member adds {fits['ours_ms']['slope']:.3f} ms (loop: {fits['loop_ms']['slope']:.3f} ms), "
        f"{fits['stack_mib']['slope']:.1f} MiB of stack, {fits['rss_mib']['slope']:.1f} MiB resident, "
        f"{fits['peak_mib']['slope']:.1f} MiB at the peak; r2 of the times {fits['ours_ms']['r2']:.3f}"
    )


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where numbers differ from the loop's."""
    if options.child:
        name, count, batch, mode, threads = options.child
        run_child(name, int(count), int(batch), mode, int(threads))
        return 0
    options.threads = use_threads(options.threads)
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("torchvision", "transformers")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    tables = []
    for name in options.model:
        tables.append(scale(name, options))
        print_scale(tables[-1])
    if options.json:
        write_json(options.json, machine, [], table="scaling", networks=tables)
    different = [(t["network"], row["members"]) for t in tables for row in t["rows"] if not row["equal"]]
    for network, count in different:
        print(f"error: {network}, {count} members: the forward differs from the loop", file=sys.stderr)
    return 1 if different else 0
