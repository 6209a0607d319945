"""The parts of benchmarks.serve.engines: turns, ratios, and the plain deployment that Ray is compared with."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

pytest.importorskip("ray")

from benchmarks.runs import engines
from benchmarks.serve.archives import SUBJECTS, loop_probabilities, read_digits, write_members
from benchmarks.serve.engines import parse_arguments
from benchmarks.serve.stock.ray_loop import Loop
from scripts.private_ray import RayServe


class Posted:
    """As much of a Starlette request as the deployment reads."""

    def __init__(self, body: bytes) -> None:
        self.own = body

    async def body(self) -> bytes:
        return self.own


def test_the_plain_deployment_answers_the_loops_mean(tmp_path):
    files = write_members(SUBJECTS["mnist"], 2, tmp_path)
    bodies = read_digits()[:2]
    want = loop_probabilities(SUBJECTS["mnist"], files, bodies)
    threads = torch.get_num_threads()
    deployed = Loop("mnist", [str(file) for file in files], threads)
    for body, row in zip(bodies, want, strict=True):
        answer = json.loads(asyncio.run(deployed(Posted(body))).body)
        assert [answer[str(index)] for index in range(10)] == pytest.approx(row.tolist(), abs=1e-6)


def test_rivals_take_turns_and_begin_with_another_each_time(monkeypatch):
    asked = []

    def run_client(plan):
        asked.append(plan.port)
        return [{"in_time": 3, "latencies_ms": [1.0] * 3, "errors": {}, "seconds": 1.0, "cpu_s": 0.1}]

    monkeypatch.setattr(engines, "run_client", run_client)
    servers = {name: RayServe([]) for name in ("a", "b")}
    ports = [server.port for server in servers.values()]
    for server in servers.values():
        server.folder.rmdir()
    rows = engines.measure(servers, [b"x"], parse_arguments(["--rounds", "2", "--seconds", "1"]))
    assert asked == [*ports, *reversed(ports)]
    assert rows["a"]["rates"] == [3.0, 3.0]


def test_a_ratio_is_of_rounds_that_stood_side_by_side():
    rows = {"a": {"rates": [30.0, 60.0, 10.0]}, "b": {"rates": [10.0, 20.0, 10.0]}}
    engines.add_ratios(rows)
    assert rows["a"]["rate_over"] == {"b": 3.0}
    assert rows["b"]["rate_over"] == {"a": pytest.approx(1 / 3)}
