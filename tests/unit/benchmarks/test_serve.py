"""The parts of benchmarks.serve: its client against a server of known answers, its sums, its checkpoints."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import benchmarks.scaled_decoding
import benchmarks.serve.in_process
from benchmarks.draw_sample_image import draw_landscape
from benchmarks.runs.serve import add_ratios
from benchmarks.serve.archives import SUBJECTS, loop_probabilities, read_digits, write_members
from benchmarks.serve.client import Client, Plan, Round, arrivals, run
from benchmarks.serve.load import make_plan, measure_memory, percentile, run_client, summarise_rounds
from benchmarks.serve.stock import workflow
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.models.mnist import MnistNet


class Known(BaseHTTPRequestHandler):
    """Answers what the path says: /a and /b probabilities, /slow late, /503 with that status."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/slow":
            time.sleep(0.05)
        if self.path == "/never":
            time.sleep(1.0)
        answer = {"/a": {"0": 0.2, "1": 0.8}, "/b": {"0": 0.6, "1": 0.4}}.get(self.path, {"length": len(body)})
        text = json.dumps(answer).encode()
        self.send_response(503 if self.path == "/503" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Known)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def plan_for(url: str, *paths: str, **load: object) -> Plan:
    return make_plan(url, list(paths), [b"four"], **{"warmup_s": 0.0, "seconds": 0.3, "rounds": 1, **load})


def run_here(plan: Plan) -> Round:
    (round_,) = asyncio.run(run(plan))
    return round_


def test_all_paths_are_asked_and_averaged(url: str) -> None:
    async def ask(*paths: str) -> object:
        client = Client(plan_for(url, *paths))
        answers = [await client.ask(b"four") for _ in range(2)]  # twice on the same connections
        client.close()
        return answers

    assert asyncio.run(ask("/a", "/b")) == [pytest.approx({"0": 0.4, "1": 0.6})] * 2
    assert asyncio.run(ask("/length")) == [{"length": 4}] * 2


def test_closed_loop_keeps_every_client_busy(url: str) -> None:
    one, four = (run_here(plan_for(url, "/slow", clients=clients)) for clients in (1, 4))
    assert min(one.latencies_ms) >= 50
    assert 3 <= len(one.latencies_ms) <= 6
    assert len(four.latencies_ms) > 2.5 * len(one.latencies_ms)
    assert one.errors == four.errors == {}


def test_what_ends_after_the_round_is_not_in_its_rate(url: str) -> None:
    round_ = run_here(plan_for(url, "/slow", clients=2, seconds=0.12))
    assert round_.in_time == len(round_.latencies_ms) - 2
    assert round_.seconds > 0.12


def test_open_loop_sends_at_its_rate_whatever_is_unanswered(url: str) -> None:
    plan = plan_for(url, "/slow", rate=100.0)
    round_ = run_here(plan)
    assert len(round_.latencies_ms) == len(list(arrivals(100.0, 0.3, seed=1)))
    assert 15 < len(round_.latencies_ms) < 50


def test_errors_are_counted_by_status_and_kind(url: str) -> None:
    refused = run_here(plan_for(url, "/a", "/503", clients=1, seconds=0.1))
    assert refused.latencies_ms == []
    assert refused.errors["503"] >= 1
    late = run_here(plan_for(url, "/never", clients=1, seconds=0.1, timeout_s=0.1))
    assert list(late.errors.values()) == [1]
    nobody = run_here(plan_for("http://127.0.0.1:1", "/a", clients=1, seconds=0.01))
    assert "ConnectionRefusedError" in nobody.errors


def test_client_runs_in_a_process_of_its_own(url: str) -> None:
    (round_,) = run_client(plan_for(url, "/a", clients=2, seconds=0.2))
    figures = summarise_rounds([round_], 0.2)
    assert figures["requests"] == len(round_["latencies_ms"]) > 0
    assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
    assert 0 < figures["client_share"] < 2


def test_a_client_that_fails_says_why() -> None:
    with pytest.raises(EnsembleError, match="the client failed: binascii"):
        run_client(Plan("127.0.0.1", 1, ["/a"], ["x"]))


def test_arrivals_are_a_poisson_process() -> None:
    times = list(arrivals(200.0, 50.0, seed=3))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)  # as of an exponential
    assert times == list(arrivals(200.0, 50.0, seed=3))


def test_summary_of_known_rounds() -> None:
    rounds = [
        {"latencies_ms": [1.0, 3.0], "in_time": 2, "errors": {"503": 1}, "seconds": 2.0, "cpu_s": 0.5},
        {"latencies_ms": [2.0, 4.0], "in_time": 1, "errors": {"503": 2, "x": 1}, "seconds": 2.0, "cpu_s": 0.5},
    ]
    figures = summarise_rounds(rounds, seconds=1.0)
    assert (figures["requests_per_s"], figures["least_requests_per_s"], figures["requests"]) == (1.5, 1.0, 4)
    assert (figures["p50_ms"], figures["p99_ms"]) == (2.0, 4.0)
    assert figures["errors"] == {"503": 3, "x": 1}
    assert figures["client_share"] == 0.25
    assert percentile([], 50) is None
    assert percentile([float(value) for value in range(1, 101)], 99) == 99.0


def test_memory_of_a_process_without_workers() -> None:
    memory = measure_memory(os.getpid())
    assert (memory["workers"], memory["worker_mib"]) == (0, 0)
    assert memory["java_mib"] > 10


def test_ratios_are_beside_separate_models_under_the_same_load() -> None:
    def row(rival: str, per_s: float, **load: float) -> dict[str, object]:
        return {"rival": rival, "requests_per_s": per_s, "p99_ms": 2 * per_s, "worker_mib": per_s, **load}

    rows = [row("separate", 10, clients=8), row("ours", 20, clients=8), row("ours", 99, rate=5.0)]
    rows.append({"rival": "workflow", "left_out": "no"})
    add_ratios(rows)
    assert (rows[1]["rate_ratio"], rows[1]["p99_ratio"], rows[1]["memory_ratio"]) == (2, 2, 2)
    assert "rate_ratio" not in rows[2]
    assert "rate_ratio" not in rows[3]


def test_reference_is_the_mean_of_distinct_members(tmp_path) -> None:
    subject = SUBJECTS["mnist"]
    files = write_members(subject, 2, tmp_path)
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert not torch.equal(first["fc2.weight"], second["fc2.weight"])
    (tmp_path / "3.png").write_bytes(read_digits()[3])
    pixels = torch.tensor(list(Image.open(tmp_path / "3.png").tobytes())).reshape(1, 1, 28, 28)
    rows = []
    for state in (first, second):
        network = MnistNet().eval()
        network.load_state_dict(state)
        rows.append(network((pixels / 255 - 0.1307) / 0.3081).exp()[0].detach())
    got = loop_probabilities(subject, files, read_digits())
    assert got.shape == (10, 10)
    torch.testing.assert_close(got[3], torch.stack(rows).mean(0), rtol=1e-5, atol=1e-7)


def test_photos_differ() -> None:
    assert len(set(SUBJECTS["resnet18"].read_bodies())) == 8


def test_workflow_functions() -> None:
    assert workflow.receive(None, None) is None
    assert workflow.average(None, None) is None
    assert workflow.receive([{"data": b"x"}, {"body": b"y"}], None) == [b"x", b"y"]
    row = {"m0": json.dumps({"0": 0.25}), "m1": json.dumps({"0": 0.75})}
    assert workflow.average([row], None) == [{"0": 0.5}]


def test_a_batch_in_process_agrees_with_the_loop(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    root = logging.getLogger()
    level = root.level
    arguments = [
        "--members",
        "2",
        "--batch",
        "1",
        "3",
        "--rounds",
        "1",
        "--execution",
        "prepared",
        "--json",
        str(file),
    ]
    assert benchmarks.serve.in_process.main(arguments) == 0
    torch.set_num_threads(threads)
    assert root.level == level
    rows = json.loads(file.read_text())["rows"]
    assert [(row["rival"], row["batch"]) for row in rows] == [("loop", 1), ("ours", 1), ("loop", 3), ("ours", 3)]
    assert all(row["total_us"] >= row["forward_us"] > 0 and row["around_us"] > 0 for row in rows)
    assert "ours: probabilities differ by" in capsys.readouterr().out


def test_scaled_decoding_is_compared_with_decoding_whole(tmp_path, capsys) -> None:
    photo, file = tmp_path / "photo.jpg", tmp_path / "rows.json"
    draw_landscape().resize((600, 400)).save(photo, quality=95)
    arguments = [str(photo), "--enlarge", "2.6", "--members", "1", "--calls", "2", "--json", str(file)]
    threads = torch.get_num_threads()
    assert benchmarks.scaled_decoding.main(arguments) == 0
    torch.set_num_threads(threads)
    rows = {(row["photo"], row["way"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 8
    exact = [rows["photo.jpg 600x400", way]["largest_steps"] for way in ("whole", "at least 1x", "at least 2x")]
    assert exact == [0, 0, 0]  # too small to be scaled
    larger = [rows["photo.jpg 1560x1040", f"at least {margin}x"] for margin in (1, 2, 4)]
    assert larger[0]["largest_steps"] >= larger[1]["largest_steps"] > larger[2]["largest_steps"] == 0
    assert "| photo.jpg 1560x1040 | at least 2x |" in capsys.readouterr().out
