"""A real Ray Serve serves real archives: the answers that TorchServe gives, batching, reconfiguration, draining."""

from __future__ import annotations

import json
import random
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("transformers")

from archiver.command import main
from scripts.private_ray import RayServe
from tests.server import bad_images
from tests.server.curl_lines import ask_as_written
from tests.server.recorded import MOST_BYTES, REQUESTS, ask_all, check_answers
from tests.server.test_bad_inputs import assert_close
from vmap_ensemble.client import Client
from vmap_ensemble.ensemble import Ensemble

pytestmark = pytest.mark.timeout(180)

BATCH = 8
# Both together fit into two logical CPUs, with a second replica of the first.
CPUS = {"num_cpus": 0.5}


def application(archives: Mapping[str, Path], replicas: int = 1, **user_config: Any) -> list[dict[str, Any]]:
    """What Ray Serve's YAML says: two archives in one application, the second one under a name with its version."""
    models = {
        # A long wait, so that requests sent together do share a batch.
        "mnist": {"archive": str(archives["mnist"]), "batch_size": BATCH, "batch_wait_s": 0.1},
        "bert/2.0": {"archive": str(archives["bert"]), "batch_size": BATCH},
    }
    deployments = [
        {"name": "mnist", "num_replicas": replicas, "ray_actor_options": CPUS, "user_config": user_config},
        {"name": "bert-2.0", "ray_actor_options": CPUS},
    ]
    return [
        {
            "name": "ensembles",
            "route_prefix": "/",
            "import_path": "vmap_ensemble.frontends.ray_serve:app",
            "args": {"models": models, "max_request_bytes": MOST_BYTES},
            "deployments": deployments,
        }
    ]


@pytest.fixture(scope="module")
def server(recorded_archives: dict[str, Path]) -> Iterator[RayServe]:
    with RayServe(application(recorded_archives)) as running:
        yield running


@pytest.fixture
def client(server: RayServe) -> Iterator[httpx.Client]:
    with server.client() as client:
        # One archive is asked by name and version.
        client.event_hooks["request"] = [_with_version]
        yield client


def _with_version(request: httpx.Request) -> None:
    if request.url.path in ("/predictions/bert", "/explanations/bert"):
        request.url = request.url.copy_with(path=f"{request.url.path}/2.0")


def test_answers_are_torchserves(
    client: httpx.Client, server: RayServe, recorded_answers: list[httpx.Response]
) -> None:
    check_answers(REQUESTS, ask_all(client, REQUESTS, 16), recorded_answers)
    assert "could not be answered" not in server.log()


def test_the_library_gives_the_same(client: httpx.Client, recorded_archives: dict[str, Path]) -> None:
    png = bad_images.png(random.Random(5))
    (answer,) = Ensemble.load(recorded_archives["mnist"]).predict([png], top_k=2, detail=True)
    with Client(str(client.base_url), "mnist", trust_env=False) as asking:
        assert_close(asking.predict(png, top_k=2, detail=True).body, answer.body)


def test_the_lines_of_the_page_are_answered(server: RayServe) -> None:
    (answer,) = ask_as_written("docs/moving.md", "http://127.0.0.1:8000", server.url, "mnist")
    assert answer["prediction"]


def test_what_is_no_request_of_a_model(client: httpx.Client) -> None:
    for method, path, status in (
        ("POST", "/", 404),
        ("POST", "/models/mnist", 404),
        ("POST", "/predictions", 404),
        ("POST", "/predictions/nobody", 404),
        ("POST", "/predictions/mnist/9.9", 404),
        ("POST", "/predictions/..%2f..%2fetc", 404),
        ("GET", "/predictions/mnist", 405),
        ("DELETE", "/explanations/bert", 405),
    ):
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, status), path
        assert ("allow" in reply.headers) == (status == 405)
    large = b"x" * (MOST_BYTES + 1)
    for body in (large, iter([large[:9000]] * 30)):  # with its length, and in chunks
        reply = client.post("/predictions/mnist", content=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, 413)
    told = client.post("/predictions/mnist", headers={"describe": "True"}).json()
    assert [row["name"] for row in told["members"]] == ["m0", "m1"]


def sums(server: RayServe, name: str) -> dict[str, float]:
    """Sum and count of a histogram, or the total of a counter, over all labels."""
    found: dict[str, float] = {}
    for line in server.metrics().splitlines():
        for part in ("sum", "count", "total"):
            if line.startswith(f"ray_{name.lower()}_{part}{{"):
                found[part] = found.get(part, 0) + float(line.rsplit(" ", 1)[1])
    return found


def wait_for(read: Any, timeout_s: float = 15) -> Any:
    """The first reading that isn't empty or false."""
    ends = time.monotonic() + timeout_s
    while not (found := read()) and time.monotonic() < ends:
        time.sleep(0.3)
    return found


def settled(server: RayServe, name: str) -> dict[str, float]:
    """The metric once it is the same for three seconds: processes report in turns."""
    seen = [sums(server, name)]

    def same() -> bool:
        time.sleep(1.5)
        seen.append(sums(server, name))
        return len(seen) > 2 and seen[-1] == seen[-2] == seen[-3]

    assert wait_for(same, 40)
    return seen[-1]


def test_requests_share_forwards_and_are_measured(client: httpx.Client, server: RayServe) -> None:
    jobs = [bad_images.png(random.Random(seed)) for seed in range(15)]
    alone = [client.post("/predictions/mnist", content=png).json() for png in jobs]
    wait_for(lambda: sums(server, "EnsembleBatchSize").get("count", 0) >= 15)
    before = settled(server, "EnsembleBatchSize")
    refused = sums(server, "EnsembleRefusedRequests").get("total", 0)
    with ThreadPoolExecutor(16) as pool:
        bad_one = pool.submit(client.post, "/predictions/mnist", content=b"no image")
        replies = list(pool.map(lambda png: client.post("/predictions/mnist", content=png), jobs))
    assert bad_one.result().status_code == 415
    for reply, own in zip(replies, alone, strict=True):
        assert_close(reply.json(), own)

    def grown() -> dict[str, float]:
        now = sums(server, "EnsembleBatchSize")
        return now if now["sum"] >= before["sum"] + len(jobs) else {}

    assert wait_for(grown)
    after = settled(server, "EnsembleBatchSize")
    assert after["sum"] == before["sum"] + len(jobs)
    # Sixteen at a time in batches of at most eight.
    assert 2 <= after["count"] - before["count"] <= 8
    assert wait_for(lambda: sums(server, "EnsembleRefusedRequests").get("total") == refused + 1)
    lines = server.metrics().splitlines()
    line = next(line for line in lines if line.startswith("ray_ensemblerefusedrequests_total{") and "415" in line)
    for label in ('ModelName="mnist"', 'ModelVersion="1.0"', 'Level="Model"', 'Reason="unknown_kind"'):
        assert label in line


def test_a_folder_is_answered_by_the_cluster_as_without(
    server: RayServe, recorded_archives: dict[str, Path], tmp_path: Path
) -> None:
    photos, rng = tmp_path / "photos", random.Random(6)
    photos.mkdir()
    for index in range(150):  # two windows, and a part of a third
        (photos / f"{index}.png").write_bytes(bad_images.png(rng))
    (photos / "70.png").write_bytes(b"no image")
    command = ["predict", str(recorded_archives["mnist"]), str(photos), "--batch-size", "8", "--threads", "1"]
    here, on_ray = tmp_path / "here.jsonl", tmp_path / "on_ray.jsonl"
    assert main([*command, "--output", str(here)]) == 0
    done = server.run("-m", "archiver.command", *command, "--output", str(on_ray), "--on", "ray")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in here.read_text().splitlines()]
    assert [line["input"] for line in lines] == [f"{index}.png" for index in range(150)]
    assert [line["input"] for line in lines if "error" in line] == ["70.png"]
    assert on_ray.read_bytes() == here.read_bytes()


def test_the_file_for_sagemaker_is_served_as_its_image_does(
    client: httpx.Client, server: RayServe, recorded_archives: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model.tar.gz"
    assert main(["export", str(recorded_archives["bert"]), "--to", "sagemaker", "--output", str(model)]) == 0
    folder = tmp_path / "model"
    with tarfile.open(model) as tar:
        tar.extractall(folder, filter="data")
    (own,) = yaml.safe_load((folder / "config.yaml").read_text())["applications"]
    # /opt/ml/model and its code/ are the image's PYTHONPATH; here another application has the address `/`.
    paths = {"PYTHONPATH": f"{folder}:{folder / 'code'}"}
    own.update(name="sagemaker", route_prefix="/image", runtime_env={"env_vars": paths})
    server.deploy([*application(recorded_archives), own])
    same = client.post("/predictions/bert", json={"text": "a great movie"}).json()
    # The image's own process for 8080 posts to `/`, with the type and headers of SageMaker's alone.
    for path in ("/image/", "/image/invocations", "/image/predictions/bert"):
        assert_close(client.post(path, json={"text": "a great movie"}).json(), same)
    explained = client.post(
        "/image/", json={"text": "a great movie"}, headers={"X-Amzn-SageMaker-Custom-Attributes": "explain"}
    )
    assert explained.json()["explanations"]
    refused = client.post("/image/", content=b"", headers={"Content-Type": "text/plain"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    ping = client.get("/image/ping")
    assert (ping.status_code, ping.content) == (200, b"")
    server.deploy(application(recorded_archives))


class Load:
    """Clients that go on asking, inside a `with` block.

    Attributes:
        statuses: Of all replies, errors of the connection among them.
    """

    def __init__(self, client: httpx.Client, clients: int = 4) -> None:
        self.client, self.statuses = client, []
        self.png, self.ended = bad_images.png(random.Random(3)), threading.Event()
        self.threads = [threading.Thread(target=self._go_on) for _ in range(clients)]

    def _go_on(self) -> None:
        while not self.ended.is_set():
            try:
                self.statuses.append(self.client.post("/predictions/mnist", content=self.png).status_code)
            except httpx.HTTPError as error:
                self.statuses.append(repr(error))

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def replicas_of(server: RayServe, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in found if f"ServeReplica:ensembles:{deployment}" in "".join(one.cmdline())]


def test_nobody_is_lost_while_replicas_come_settings_change_and_replicas_go(
    client: httpx.Client, server: RayServe, recorded_archives: dict[str, Path]
) -> None:
    png = bad_images.png(random.Random(4))
    with Load(client) as load:
        server.deploy(application(recorded_archives, replicas=2))
        # One is drained; the one that is left has other settings from now on.
        server.deploy(application(recorded_archives, replicas=1, batch_size=4, settings={"top_k": 1}))
        assert {len(client.post("/predictions/mnist", content=png).json()["top_k"]) for _ in range(8)} == {1}
    assert len(load.statuses) > 50
    assert set(load.statuses) == {200}


def test_a_replica_that_is_killed_takes_no_more_with_it_than_it_had(
    client: httpx.Client, server: RayServe, recorded_archives: dict[str, Path]
) -> None:
    server.deploy(application(recorded_archives, replicas=2))
    answers: list[Any] = []
    ended = threading.Event()

    def ask_with_retries() -> None:
        with Client(server.url, "mnist", trust_env=False) as asking:
            while not ended.is_set():
                answers.append(asking.predict(png).label)

    png = bad_images.png(random.Random(4))
    with ThreadPoolExecutor(4) as pool, Load(client, clients=4) as load:
        clients = [pool.submit(ask_with_retries) for _ in range(4)]
        try:
            assert wait_for(lambda: len(answers) > 20 and len(load.statuses) > 20)
            victim, survivor = replicas_of(server, "mnist")
            victim.kill()
            victim.wait(timeout=30)
            before = len(answers), len(load.statuses)
            assert wait_for(lambda: len(answers) > before[0] + 20 and len(load.statuses) > before[1] + 20)
        finally:
            ended.set()
    for one in clients:
        one.result()  # a request that stayed without an answer would raise
    assert survivor.is_running()
    lost = [status for status in load.statuses if status != 200]
    # Those that the replica had are refused, so that a client may ask again; nobody hears of a closed connection.
    assert set(lost) <= {503}
    assert len(lost) <= len(load.threads)
    # Ray starts another in its place, once it has noticed: until then it calls the application healthy.
    assert wait_for(lambda: len(replicas_of(server, "mnist")) == 2, timeout_s=90)
    server.deploy(application(recorded_archives, replicas=2))
    server.deploy(application(recorded_archives))
