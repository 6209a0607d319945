"""What docs/deployment.md and operations.md say of probes, full queues, keys and logs, seen on a real TorchServe."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from archiver.__main__ import main as archive
from scripts.private_torchserve import ROOT, TorchServe
from tests.server.conftest import write_archive
from vmap_ensemble.frontends.health import main as health
from vmap_ensemble.models.mnist import MnistNet

DIGIT = str(ROOT / "data" / "digits" / "3.png")
SLOW_HANDLER = """\
import time


def handle(data, context):
    if data is None:
        return None
    time.sleep(1)
    return ["late" for _ in data]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("probes")
    torch.manual_seed(0)
    torch.save(MnistNet().state_dict(), folder / "a.pt")
    assert archive(["mnist_ens", "--members", str(folder / "a.pt"), "--output", str(folder)]) == 0
    slow = write_archive(folder, "slow", SLOW_HANDLER)
    with TorchServe({"ens": folder / "mnist_ens.mar", "slow": slow}, settings={"job_queue_size": "2"}) as running:
        yield running


def test_a_worker_that_answers_is_healthy(server: TorchServe, capsys: pytest.CaptureFixture[str]) -> None:
    assert health([f"{server.inference_url}/predictions/ens", "--input", DIGIT, "--timeout", "30"]) == 0
    assert capsys.readouterr().out.startswith("healthy: answered in ")


def lines_of(page: str, start: str) -> list[str]:
    return re.findall(rf"^    ({re.escape(start)}.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)


def test_the_line_of_the_page_is_healthy(server: TorchServe) -> None:
    (line,) = lines_of("deployment.md", "vmap-ensemble health http:")
    words = shlex.split(line.replace("http://127.0.0.1:8080", server.inference_url).replace("data/", f"{ROOT}/data/"))
    assert health(words[2:]) == 0


def test_the_line_of_the_page_gives_metrics(server: TorchServe) -> None:
    server.predict(content=Path(DIGIT).read_bytes())
    (line,) = lines_of("monitoring.md", "curl")
    words = shlex.split(line.replace("http://127.0.0.1:8082", server.metrics_url))
    done = subprocess.run([*words, "-sS"], capture_output=True, text=True, timeout=60)
    assert "EnsembleForwardTime_count" in done.stdout, done.stderr


def test_one_that_is_too_slow_is_not(server: TorchServe, capsys: pytest.CaptureFixture[str]) -> None:
    assert health([f"{server.inference_url}/predictions/slow", "--text", "x", "--timeout", "0.3"]) == 1
    assert "no answer within 0.3 s" in capsys.readouterr().err


def test_a_full_queue_is_a_503_in_torchserves_words(server: TorchServe) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: server.predict("slow", content=b"x"), range(8)))
    assert {reply.status_code for reply in replies} == {200, 503}
    refused = next(reply for reply in replies if reply.status_code == 503)
    assert 'Model "slow" has no worker' in refused.json()["message"]


def test_bodies_that_are_not_json_leave_no_line(server: TorchServe) -> None:
    before = len(server.logs())
    for body in (b'{"secret": ', b"\xff", b"[1,"):
        reply = server.predict(content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400
    time.sleep(1)
    assert len(server.logs()) == before


def test_a_header_asks_for_the_description(server: TorchServe) -> None:
    reply = server.predict(content=b"x", headers={"describe": "True"})
    assert reply.status_code == 200
    assert [member["name"] for member in reply.json()["members"]] == ["a"]


def test_ping_is_healthy_without_any_worker_and_health_is_not(
    server: TorchServe, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.client("management") as client:
        none = {"min_worker": 0, "max_worker": 0, "synchronous": "true"}
        assert client.put("/models/slow", params=none).status_code == 200
    with server.client() as client:
        assert client.get("/ping").json() == {"status": "Healthy"}
    assert health([f"{server.inference_url}/predictions/slow", "--text", "x"]) == 1
    assert "status 503" in capsys.readouterr().err


def test_production_asks_for_keys_everywhere_but_at_the_metrics(
    ok_archive: Path, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pem, private = map(str, certificate)
    settings = {"certificate_file": pem, "private_key_file": private}
    config = ROOT / "config" / "production.properties"
    with TorchServe({"ok": ok_archive}, config=config, settings=settings, certificate=certificate[0]) as running:
        paths = {"inference": "/ping", "management": "/models/ok", "metrics": "/metrics"}
        statuses = {}
        for purpose, path in paths.items():
            with running.client(purpose, with_key=False) as client:
                statuses[purpose] = client.get(path).status_code
        assert statuses == {"inference": 400, "management": 400, "metrics": 200}
        url = f"{running.inference_url}/predictions/ok"
        running.key("inference")
        keys = str(running.launch.cwd / "key_file.json")
        assert health([url, "--text", "x", "--cacert", pem, "--key-file", keys]) == 0
        assert health([url, "--text", "x", "--cacert", pem]) == 1
        assert health([url, "--text", "x", "--key-file", keys]) == 1
    no_key, no_trust = capsys.readouterr().err.splitlines()
    assert "status 400, Token Authorization failed" in no_key
    assert "certificate verify failed" in no_trust
