"""Rivals, each in a TorchServe of its own -> rows of requests per second, latencies and memory."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.measure import describe_machine, describe_versions, write_json
from benchmarks.options import OPEN_SHARE
from benchmarks.serve.archives import SUBJECTS, loop_probabilities, write_members
from benchmarks.serve.load import make_plan, measure_memory, run_client, summarise_rounds
from benchmarks.serve.rivals import RIVALS, Rival, Setting
from scripts.private_torchserve import TorchServe
from scripts.torchserve_process import ServerError
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.threads import cores_at_hand

TOLERANCE = 1e-4  # absolute, of a probability


def serve_once(rival: Rival, bodies: list[bytes], want: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One rival's rows, one per load; a rival that can't be had is one row with the reason."""
    setting = rival.setting
    head = {"rival": rival.name, "members": len(setting.files)}
    started = time.perf_counter()
    try:
        with rival.serve() as server:
            ready_s = time.perf_counter() - started
            got = torch.stack([rival.ask(server, body) for body in bodies])
            difference = float((got - want).abs().max())
            facts = {"ready_s": ready_s, "largest_difference": difference, "equal": difference <= TOLERANCE}
            return [{**head, **facts, **row} for row in run_loads(rival, server, bodies, options)]
    except (ServerError, EnsembleError, OSError) as error:
        print(f"{rival.name} is left out: {error}", file=sys.stderr)
        return [{**head, "left_out": str(error).splitlines()[0]}]


def run_loads(
    rival: Rival, server: TorchServe, bodies: list[bytes], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The closed loops, then the open one; memory is looked at after each."""
    loads: list[dict[str, Any]] = [{"clients": clients} for clients in options.clients if clients]
    rows = []
    length = {"warmup_s": options.warmup, "seconds": options.seconds, "rounds": options.rounds}
    while loads:
        load = loads.pop(0)
        plan = make_plan(server.inference_url, rival.paths, bodies, **load, **length)
        row = {**load, **summarise_rounds(run_client(plan), options.seconds), **measure_memory(server.pid)}
        rows.append(row)
        print_row({"rival": rival.name, **row})
        if options.rate is None and rival.name == "separate" and "clients" in load:
            options.rate = OPEN_SHARE * row["requests_per_s"]
        if not loads and options.rate and "rate" not in load:
            loads = [{"rate": options.rate}]
    return rows


def print_row(row: dict[str, Any]) -> None:
    """Print one load of one rival."""
    load = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.1f}/s arrive"
    latencies = "  ".join(f"{row[key]:8.1f}" if row[key] else f"{'-':>8}" for key in ("p50_ms", "p99_ms"))
    print(
        f"{row['rival']:15} {load:16} {row['requests_per_s']:8.1f}/s  {latencies} ms  errors "
        f"{sum(row['errors'].values()):4}  workers {row['worker_mib']:7.0f} MiB  Java {row['java_mib']:5.0f} MiB  "
        f"client {row['client_share']:4.0%} of a core",
        flush=True,
    )


def compare(handler: str, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rivals with one size of one ensemble; each row gets its ratios to the models registered separately."""
    subject = SUBJECTS[handler]
    bodies = subject.read_bodies()
    print(f"\n{handler}, {count} members, batchSize {options.batch_size}, maxBatchDelay {options.delay_ms} ms")
    rate, rows = options.rate, []
    with tempfile.TemporaryDirectory() as scratch:
        # The choice of "execution": "auto" is measured at each load, and leaves nothing in the user's cache.
        os.environ["XDG_CACHE_HOME"] = scratch
        files = write_members(subject, count, Path(scratch))
        want = loop_probabilities(subject, files, bodies)
        for name in sorted(options.rivals, key=list(RIVALS).index):
            folder = Path(scratch) / name
            folder.mkdir()
            setting = Setting(subject, files, folder, cores_at_hand(), options.batch_size, options.delay_ms)
            rows += serve_once(RIVALS[name](setting), bodies, want, options)
    options.rate = rate
    add_ratios(rows)
    return [{"handler": handler, **row} for row in rows]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Write into each row what it is beside `separate` under the same load."""
    for row in rows:
        if "left_out" in row:
            continue
        load = (row.get("clients"), row.get("rate"))
        for base in rows:
            if base["rival"] == "separate" and (base.get("clients"), base.get("rate")) == load:
                row["rate_ratio"] = row["requests_per_s"] / max(base["requests_per_s"], 1e-9)
                row["p99_ratio"] = (row["p99_ms"] or float("inf")) / (base["p99_ms"] or float("inf"))
                row["memory_ratio"] = row["worker_mib"] / base["worker_mib"]


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Print every rival beside the models registered separately."""
    for row in rows:
        if "rate_ratio" in row and row["rival"] != "separate":
            load = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.1f}/s arrive"
            print(
                f"{row['handler']} x {row['members']}, {load}: {row['rival']} has {row['rate_ratio']:.2f}x the "
                f"requests per second of separate models, {row['p99_ratio']:.2f}x their p99, "
                f"{row['memory_ratio']:.2f}x their memory; probabilities differ by {row['largest_difference']:.0e}"
            )


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where a rival's probabilities differ from the loop's."""
    # As an exception, so that a server that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("torchserve")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = [
        row for handler in options.handlers for count in options.members for row in compare(handler, count, options)
    ]
    print()
    print_ratios(rows)
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key != "json"}
        texts = {name: rival.text for name, rival in RIVALS.items()}
        write_json(options.json, machine, [], table="serve", setting=setting, rivals=texts, rows=rows)
    different = [row for row in rows if not row.get("equal", True)]
    for row in different:
        print(f"error: {row['rival']} differs from the loop by {row['largest_difference']:.1e}", file=sys.stderr)
    return 1 if different else 0
