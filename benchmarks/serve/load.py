"""A running rival -> its rows: requests per second, latencies, errors and memory under closed and open load."""

from __future__ import annotations

import base64
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.serve.client import Plan
from vmap_ensemble.errors import EnsembleError

ROOT = Path(__file__).resolve().parents[2]


def make_plan(url: str, paths: list[str], bodies: list[bytes], **load: Any) -> Plan:
    """A plan for the client; `load` are the fields of Plan that say how often."""
    address = urlsplit(url)
    texts = [base64.b64encode(body).decode() for body in bodies]
    return Plan(address.hostname or "127.0.0.1", address.port or 80, paths, texts, **load)


def run_client(plan: Plan) -> list[dict[str, Any]]:
    """Run the client in a process of its own; returns its rounds.

    Raises:
        EnsembleError: it failed.
    """
    budget_s = plan.warmup_s + plan.rounds * plan.seconds + (plan.rounds + 1) * plan.timeout_s
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve.client"], input=json.dumps(asdict(plan)),
        capture_output=True, text=True, cwd=ROOT, timeout=budget_s, check=False,
    )  # fmt: skip
    if done.returncode:
        raise EnsembleError(f"the client failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    rounds: list[dict[str, Any]] = json.loads(done.stdout)
    return rounds


def summarise_rounds(rounds: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Rates of the rounds, latencies of all their requests; None where nothing was answered.

    Args:
        rounds: what the client gave.
        seconds: length of a round.

    Returns:
        requests_per_s (median of the rounds, with its least and greatest), p10, p50, p90 and p99 in ms, requests,
        errors, client_share: processor time of the client per second, 1 being a whole core.
    """
    rates = [round_["in_time"] / seconds for round_ in rounds]
    latencies = sorted(latency for round_ in rounds for latency in round_["latencies_ms"])
    errors: Counter[str] = Counter()
    for round_ in rounds:
        errors.update(round_["errors"])
    return {
        "requests_per_s": statistics.median(rates),
        "least_requests_per_s": min(rates),
        "greatest_requests_per_s": max(rates),
        **{f"p{percent}_ms": percentile(latencies, percent) for percent in (10, 50, 90, 99)},
        "requests": len(latencies),
        "errors": dict(errors),
        "client_share": sum(round_["cpu_s"] for round_ in rounds) / sum(round_["seconds"] for round_ in rounds),
    }


def percentile(values: list[float], percent: int) -> float | None:
    """The least of the sorted values that so many percent don't exceed."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def measure_memory(pid: int) -> dict[str, Any]:
    """Memory of a server in MiB, workers and Java apart.

    Proportional set size where the system tells it (Linux): pages that several processes map are shared out among
    them, so that the sum over workers counts none twice. Else the unique set size, which leaves them out.
    """
    server = psutil.Process(pid)
    workers = [child for child in server.children(recursive=True) if _is_worker(child)]
    return {
        "workers": len(workers),
        "worker_mib": sum(_size_mib(worker) for worker in workers),
        "java_mib": _size_mib(server),
        "memory": "pss" if hasattr(server.memory_full_info(), "pss") else "uss",
    }


def _is_worker(process: psutil.Process) -> bool:
    return any("model_service_worker.py" in part for part in process.cmdline())


def _size_mib(process: psutil.Process) -> float:
    info = process.memory_full_info()
    return float(getattr(info, "pss", info.uss)) / 2**20
