"""Engines, all running at once -> rows of requests per second and latencies, measured in turns."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.measuring.measure import describe_machine, describe_versions, write_json
from benchmarks.serve.archives import CLASSES, SUBJECTS, loop_probabilities, pack_ours, write_members
from benchmarks.serve.load import make_plan, run_client, summarise_rounds
from benchmarks.serve.rivals import Ours, Setting
from scripts.private_ray import RayServe
from scripts.private_torchserve import TorchServe, free_ports

TOLERANCE = 1e-4  # absolute, of a probability
PATH = "/predictions/ens"
Server = TorchServe | RayServe


class Engines:
    """Ways to serve one ensemble, one method each: () -> a server that isn't started.

    Args:
        setting: As of the rivals of `benchmarks.serve`; `cores` are the torch threads.
        handler: What is served, a key of SUBJECTS.
    """

    def __init__(self, setting: Setting, handler: str) -> None:
        self._setting, self._handler = setting, handler
        self._archive = pack_ours(setting.subject, setting.files, setting.folder, "auto")

    def torchserve(self) -> TorchServe:
        """Our archive in TorchServe."""
        return TorchServe({"ens": self._archive}, batching=Ours(self._setting).batching(), timeout_s=300)

    def ray(self) -> RayServe:
        """Our archive in Ray Serve."""
        return self._ours({})

    def ray_haproxy(self) -> RayServe:
        """Our archive in Ray Serve behind HAProxy, in its throughput mode."""
        return self._ours(behind_haproxy())

    def ray_loop(self) -> RayServe:
        """A plain deployment of Ray Serve that calls the members one by one."""
        return self._loop({})

    def ray_loop_haproxy(self) -> RayServe:
        """The same behind HAProxy, in its throughput mode."""
        return self._loop(behind_haproxy())

    def _ours(self, variables: dict[str, str]) -> RayServe:
        batching = {"batch_size": self._setting.batch_size, "batch_wait_s": self._setting.delay_ms / 1000}
        args = {"name": "ens", "archive": str(self._archive), **batching}
        return self._ray("vmap_ensemble.frontends.ray_serve:app", args, variables)

    def _loop(self, variables: dict[str, str]) -> RayServe:
        files = [str(file) for file in self._setting.files]
        args = {"handler": self._handler, "files": files, "threads": self._setting.cores}
        return self._ray("benchmarks.serve.stock.ray_loop:app", args, variables)

    def _ray(self, path: str, args: dict[str, Any], variables: dict[str, str]) -> RayServe:
        deployment = {"name": "ens", "ray_actor_options": {"num_cpus": self._setting.cores}}
        application = {
            "name": "ensembles", "route_prefix": "/", "import_path": path, "args": args, "deployments": [deployment],
        }  # fmt: skip
        return RayServe([application], timeout_s=300, variables=variables)


def behind_haproxy() -> dict[str, str]:
    """Ray's own switches: requests go from HAProxy to a replica's own server, in place of a proxy in Python."""
    statistics_port, metrics_port = free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Every Ray has the same ports otherwise.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        # Nobody asks while it is stopped.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def ask(server: Server, body: bytes) -> Tensor:
    """(classes,) probabilities that a client gets for one picture."""
    with httpx.Client(base_url=url_of(server), timeout=60, trust_env=False) as client:
        answer = client.post(PATH, content=body, headers={"Content-Type": "application/octet-stream"})
    told = answer.raise_for_status().json()
    found = {str(row["index"]): row["probability"] for row in told["top_k"]} if "top_k" in told else told
    return torch.tensor([float(found[str(index)]) for index in range(CLASSES)])


def url_of(server: Server) -> str:
    """Where a server is asked for predictions."""
    return server.url if isinstance(server, RayServe) else server.inference_url


def measure(
    servers: dict[str, Server], bodies: list[bytes], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Rates of each over its rounds; the rivals take turns, and the turns begin with another one each time."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for number in range(options.rounds):
        names = list(servers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            load = {"clients": options.clients, "warmup_s": 1.0, "seconds": options.seconds, "rounds": 1}
            rounds[name] += run_client(make_plan(url_of(servers[name]), [PATH], bodies, **load))
    return {
        name: {
            **summarise_rounds(own, options.seconds),
            "rates": [round_["in_time"] / options.seconds for round_ in own],
        }
        for name, own in rounds.items()
    }


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Write into each row its rate over every other's: the median of the ratios of rounds that stood side by side."""
    for row in rows.values():
        row["rate_over"] = {
            name: statistics.median(
                mine / max(theirs, 1e-9) for mine, theirs in zip(row["rates"], other["rates"], strict=True)
            )
            for name, other in rows.items()
            if other is not row
        }


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where a rival's probabilities differ from the loop's."""
    # As an exception, so that servers that were started are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(options.threads)
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("torchserve", "ray", "ray-haproxy")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    subject = SUBJECTS[options.handler]
    bodies = subject.read_bodies()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        # The choice of "execution": "auto" is measured at each load, and leaves nothing in the user's cache.
        os.environ["XDG_CACHE_HOME"] = scratch
        files = write_members(subject, options.members, Path(scratch))
        want = loop_probabilities(subject, files, bodies)
        setting = Setting(subject, files, Path(scratch), options.threads, options.batch_size, options.delay_ms)
        engines = Engines(setting, options.handler)
        servers: dict[str, Server] = {}
        for name in options.rivals:
            start: Callable[[], AbstractContextManager[Server]] = getattr(engines, name)
            servers[name] = running.enter_context(start())
        differences = {
            name: float((torch.stack([ask(server, body) for body in bodies]) - want).abs().max())
            for name, server in servers.items()
        }
        rows = measure(servers, bodies, options)
        add_ratios(rows)
        for name, row in rows.items():
            row["largest_difference"] = differences[name]
            print_row(name, row)
    if options.json:
        chosen = {key: value for key, value in vars(options).items() if key != "json"}
        texts = {name: getattr(Engines, name).__doc__ for name in options.rivals}
        named = [{"rival": name, **row} for name, row in rows.items()]
        write_json(options.json, machine, [], table="engines", setting=chosen, rivals=texts, rows=named)
    different = {name: value for name, value in differences.items() if value > TOLERANCE}
    for name, value in different.items():
        print(f"error: {name} differs from the loop by {value:.1e}", file=sys.stderr)
    return 1 if different else 0


def print_row(name: str, row: dict[str, Any]) -> None:
    """Print one rival, and its rate over the others'."""
    ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row["rate_over"].items())
    latencies = "  ".join(f"{row[key]:7.1f}" if row[key] else f"{'-':>7}" for key in ("p50_ms", "p99_ms"))
    print(
        f"{name:17} {row['requests_per_s']:7.1f}/s  {latencies} ms  errors {sum(row['errors'].values())}  "
        f"client {row['client_share']:4.0%} of a core  differs by {row['largest_difference']:.0e}  {ratios}",
        flush=True,
    )
