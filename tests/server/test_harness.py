"""The harness itself: a real TorchServe starts, answers, says why it can't, and leaves nothing behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from scripts.private_torchserve import ROOT, TorchServe
from scripts.torchserve_process import ServerError, busy_ports, is_running, stop
from tests.server.grpc_client import predict_grpc


@pytest.fixture(scope="module")
def server(ok_archive: Path) -> Iterator[TorchServe]:
    # A long delay: clients that start within 300 ms of each other must meet in one batch.
    with TorchServe({"ok": ok_archive}, batching={"batchSize": 4, "maxBatchDelay": 300}) as running:
        yield running


def test_answers_over_http(server: TorchServe) -> None:
    answer = server.predict("ok", content=b"x")
    assert (answer.status_code, answer.text) == (200, "ok 1")


def test_answers_over_grpc(server: TorchServe) -> None:
    assert predict_grpc(server.grpc_address, "ok", b"x") == b"ok 1"


def test_batch_settings_reach_the_worker(server: TorchServe) -> None:
    description = server.describe("ok")
    assert (description["batchSize"], description["maxBatchDelay"]) == (4, 300)
    assert len(description["workers"]) == 1
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.predict("ok", content=b"x").text, range(4)))
    assert answers == ["ok 4"] * 4


def test_metrics_are_served(server: TorchServe) -> None:
    server.predict("ok", content=b"x")
    assert 'ts_inference_requests_total{model_name="ok"' in server.metrics()


def test_logs_have_no_line_per_request(server: TorchServe) -> None:
    before = len(server.logs())
    for _ in range(20):
        server.predict("ok", content=b"x")
    assert len(server.logs()) - before < 200


def test_listens_on_loopback_only(server: TorchServe) -> None:
    listening = [c for c in psutil.Process(server.pid).connections() if c.status == psutil.CONN_LISTEN]
    addresses = {c.laddr.ip.removeprefix("::ffff:") for c in listening}
    assert addresses == {"127.0.0.1"}
    assert len(listening) == 5


def test_leaves_no_process_and_no_file(ok_archive: Path) -> None:
    with TorchServe({"ok": ok_archive}) as running:
        server = psutil.Process(running.pid)
        tree = [server, *server.children(recursive=True)]
        assert len(tree) >= 2, "the Java process and at least one worker"
    assert [process for process in tree if is_running(process)] == []
    assert not running.folder.exists()


def test_stop_ends_workers_that_survive_their_server(ok_archive: Path) -> None:
    with TorchServe({"ok": ok_archive}) as running:
        workers = psutil.Process(running.pid).children(recursive=True)
        stop(running.pid)
        assert [worker for worker in workers if is_running(worker)] == []


def test_failing_worker_is_explained_at_once(broken_archive: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)could not load.*ValueError: member b lacks the key fc\.weight"):
        TorchServe({"broken": broken_archive}).__enter__()


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "config.properties"
        config.write_text(f"inference_address=http://127.0.0.1:{port}\n")
        assert busy_ports(config) == [f"inference_address 127.0.0.1:{port}"]


def test_production_wants_keys_and_speaks_tls(ok_archive: Path, certificate: tuple[Path, Path]) -> None:
    chain, private_key = certificate
    with TorchServe(
        {"ok": ok_archive},
        config=ROOT / "config" / "production.properties",
        settings={"certificate_file": str(chain), "private_key_file": str(private_key)},
        certificate=chain,
    ) as running:
        assert running.inference_url.startswith("https://")
        with running.client(with_key=False) as client:
            refused = client.post("/predictions/ok", content=b"x")
        assert refused.status_code == 400
        assert running.predict("ok", content=b"x").text == "ok 1"
        with running.client("management") as client:
            register = client.post("/models", params={"url": "ok.mar"})
            assert register.status_code == 405, "the model API is closed"
        too_large = running.predict("ok", content=b"x" * (8388608 + 1))
        assert too_large.status_code == 413
        key_file = running.launch.cwd / "key_file.json"
        assert key_file.stat().st_mode & 0o077 == 0, "the keys are readable by their user alone"
        with pytest.raises(grpc.RpcError) as no_key:
            predict_grpc(running.grpc_address, "ok", b"x", certificate=chain)
        assert no_key.value.code() == grpc.StatusCode.PERMISSION_DENIED
        key = running.key("inference")
        assert predict_grpc(running.grpc_address, "ok", b"x", key=key, certificate=chain) == b"ok 1"
