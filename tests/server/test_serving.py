"""A real TorchServe serves a real archive: answers over HTTP and gRPC, batching, errors, description, metrics."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from archiver.__main__ import main as archive
from scripts.private_torchserve import TorchServe
from tests.server.grpc_client import predict_grpc, stream_grpc
from vmap_ensemble.client import Client, Refused
from vmap_ensemble.client.grpc import GrpcClient
from vmap_ensemble.models.mnist import MnistNet

NAMES = ("red", "green", "blue")
MODEL = "ens"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("members")
    paths = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        paths[name] = folder / f"{name}.pt"
        torch.save(MnistNet().state_dict(), paths[name])
    return paths


@pytest.fixture(scope="module")
def server(members: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    store = tmp_path_factory.mktemp("store")
    command = ["mnist_ens", "--members", *map(str, members.values()), "--output", str(store)]
    assert archive(command) == 0
    # A long delay, so that requests sent together do share a batch.
    batching = {"batchSize": 8, "maxBatchDelay": 200}
    with TorchServe({MODEL: store / "mnist_ens.mar"}, batching=batching) as running:
        yield running


def digit(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def loop_probabilities(members: dict[str, Path], png: bytes, names: tuple[str, ...] = NAMES) -> torch.Tensor:
    """What a user's plain loop over the checkpoints gives: (C,) mean of the members' probabilities."""
    image = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png)), dtype=np.float32) / 255)
    x = ((image - 0.1307) / 0.3081)[None, None]
    rows = []
    for name in names:
        net = MnistNet().eval()
        net.load_state_dict(torch.load(members[name], weights_only=True))
        with torch.no_grad():
            rows.append(net(x).exp()[0])
    return torch.stack(rows).mean(0)


def check_answer(answer: dict[str, Any], expected: torch.Tensor) -> None:
    got = {row["index"]: row["probability"] for row in answer["top_k"]}
    for index, probability in got.items():
        assert probability == pytest.approx(expected[index].item(), rel=1e-5)
    assert answer["prediction"]["index"] == int(expected.argmax())


def test_answers_equal_the_plain_loop_over_http(server: TorchServe, members: dict[str, Path]) -> None:
    png = digit(0)
    reply = server.predict(content=png)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("application/json")
    check_answer(reply.json(), loop_probabilities(members, png))


def test_a_batch_of_many_clients_answers_each_with_its_own(server: TorchServe, members: dict[str, Path]) -> None:
    jobs: list[tuple[str, int]] = [("good", seed) for seed in range(16)]
    jobs += [("text", 100), ("empty", 101), ("cut", 102), ("unknown", 103), ("subset", 104), ("subset", 105)]
    random.Random(0).shuffle(jobs)

    def send(job: tuple[str, int]) -> Any:
        kind, seed = job
        if kind == "text":
            return server.predict(content=b"a text", headers={"Content-Type": "text/plain"})
        if kind == "empty":
            return server.predict(content=b"")
        if kind == "cut":
            return server.predict(content=digit(seed)[:200])
        headers = {"unknown": {"X-Ensemble-Subset": "pink"}, "subset": {"x-ensemble-subset": "red,blue"}}
        return server.predict(content=digit(seed), headers=headers.get(kind, {}))

    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = list(pool.map(send, jobs))
    expected_status = {"good": 200, "subset": 200, "text": 415, "empty": 400, "cut": 400, "unknown": 422}
    for (kind, seed), reply in zip(jobs, replies, strict=True):
        assert reply.status_code == expected_status[kind], (kind, reply.text)
        if reply.status_code == 200:
            names = NAMES if kind == "good" else ("red", "blue")
            check_answer(reply.json(), loop_probabilities(members, digit(seed), names))
        else:
            assert reply.json()["error"]["code"] == reply.status_code
            assert "/" not in reply.json()["error"]["message"].replace("text/plain", "")


def test_requests_did_share_forwards(server: TorchServe) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {r.status_code for r in pool.map(lambda s: server.predict(content=digit(s)), range(8))} == {200}
    lines = server.metrics().splitlines()
    total, count = (
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"EnsembleBatchSize_{part}"))
        for part in ("sum", "count")
    )
    assert total > count > 0


def test_options_arrive_as_header_field_and_json(server: TorchServe) -> None:
    png = digit(1)
    by_header = server.predict(content=png, headers={"X-Ensemble-Detail": "members", "X-Ensemble-Top-K": "2"})
    by_field = server.predict(files={"data": png}, data={"detail": "members", "top_k": "2"})
    pixels = (np.asarray(Image.open(io.BytesIO(png)), dtype=np.float32) / 255 - 0.1307) / 0.3081
    by_json = server.predict(json={"data": pixels[None].tolist(), "detail": "members", "top_k": 2})
    for reply in (by_header, by_field, by_json):
        answer = reply.json()
        assert [row["name"] for row in answer["members"]] == list(NAMES)
        assert len(answer["top_k"]) == 2
        assert answer["prediction"]["probability"] == pytest.approx(
            by_header.json()["prediction"]["probability"], rel=1e-5
        )


def test_curl_d_is_told_how_to_send(server: TorchServe) -> None:
    reply = server.predict(data={"some text": ""})
    assert reply.status_code == 400
    assert "curl -T" in reply.json()["error"]["message"]


def test_kserve_bodies_in_one_batch(server: TorchServe, members: dict[str, Path]) -> None:
    x = torch.zeros(1, 28, 28).tolist()
    bodies = [
        {"instances": [{"data": x}, {"data": x}]},
        {"id": "7", "inputs": [{"name": "x", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": x}]},
    ]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda body: server.predict(json=body).json(), bodies)
    assert len(first["predictions"]) == 2
    assert second["id"] == "7"
    assert json.loads(second["outputs"][0]["data"][0])["prediction"] == first["predictions"][0]["prediction"]


def test_grpc_answers_and_carries_the_error_in_the_body(server: TorchServe, members: dict[str, Path]) -> None:
    png = digit(3)
    answer = json.loads(predict_grpc(server.grpc_address, MODEL, png, fields={"subset": b"green"}))
    check_answer(answer, loop_probabilities(members, png, ("green",)))
    refused = json.loads(predict_grpc(server.grpc_address, MODEL, b"not an image"))
    assert refused["error"]["code"] == 415


def test_a_streaming_rpc_ends_with_its_one_answer_and_the_worker_goes_on(
    server: TorchServe, members: dict[str, Path]
) -> None:
    workers = [worker["pid"] for worker in server.describe(MODEL)["workers"]]
    for seed in (6, 7):
        (answer,) = stream_grpc(server.grpc_address, MODEL, digit(seed))
        check_answer(json.loads(answer), loop_probabilities(members, digit(seed)))
    (refused,) = stream_grpc(server.grpc_address, MODEL, b"not an image")
    assert json.loads(refused)["error"]["code"] == 415
    unary = json.loads(predict_grpc(server.grpc_address, MODEL, digit(6)))
    check_answer(unary, loop_probabilities(members, digit(6)))
    check_answer(server.predict(content=digit(7)).json(), loop_probabilities(members, digit(7)))
    assert [worker["pid"] for worker in server.describe(MODEL)["workers"]] == workers


def test_streams_share_batches_with_other_requests(server: TorchServe, members: dict[str, Path]) -> None:
    def ask(seed: int) -> dict[str, Any]:
        if seed % 3 == 0:
            (answer,) = stream_grpc(server.grpc_address, MODEL, digit(seed))
        elif seed % 3 == 1:
            answer = predict_grpc(server.grpc_address, MODEL, digit(seed))
        else:
            answer = server.predict(content=digit(seed)).content
        return dict(json.loads(answer))

    workers = [worker["pid"] for worker in server.describe(MODEL)["workers"]]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    for seed, answer in enumerate(answers):
        check_answer(answer, loop_probabilities(members, digit(seed)))
    assert [worker["pid"] for worker in server.describe(MODEL)["workers"]] == workers


def test_explain_is_a_501_of_its_own(server: TorchServe) -> None:
    with server.client() as client, ThreadPoolExecutor(2) as pool:
        explain = pool.submit(client.post, f"/explanations/{MODEL}", content=digit(4))
        predict = pool.submit(server.predict, content=digit(4))
        assert explain.result().status_code == 501
        assert predict.result().status_code == 200


def test_the_description_tells_what_is_served(server: TorchServe) -> None:
    description = server.describe(MODEL, customized=True)["customizedMetadata"]
    told = json.loads(description) if isinstance(description, str) else description
    assert [row["name"] for row in told["members"]] == list(NAMES)
    assert all(len(row["sha256"]) == 64 for row in told["members"])
    assert told["architecture"] == "mnist"
    assert told["equivalence"]["largest_difference"] < 1e-5
    assert told["labels"] == [str(number) for number in range(10)]


def test_the_clients_of_the_package(server: TorchServe) -> None:
    files = [digit(seed) for seed in range(12)]
    with (
        Client(server.inference_url, MODEL, trust_env=False) as http,
        GrpcClient(server.grpc_address, MODEL) as grpc,
    ):
        answers = http.predict_batch([*files, b"not an image"], concurrency=8)
        for file, answer in zip(files, answers[:-1], strict=True):
            own = server.predict(content=file).json()
            assert answer.label == own["prediction"]["label"] == grpc.predict(file).label
            assert answer.probability == pytest.approx(own["prediction"]["probability"], abs=1e-5)
        assert (type(answers[-1]), answers[-1].status) == (Refused, 415)
        with pytest.raises(Refused, match="415"):
            grpc.predict(b"not an image")
        assert grpc.predict(files[0], subset=["green"]).body["ensemble"]["subset"] == ["green"]
        assert [one.label for one in http.predict(files[:2])] == [answer.label for answer in answers[:2]]


def test_metrics_reach_prometheus_under_their_own_labels(server: TorchServe) -> None:
    assert server.predict(content=b"").status_code == 400
    assert server.predict(content=digit(5)).status_code == 200
    text = server.metrics()
    for name in ("EnsembleParseTime", "EnsembleForwardTime", "EnsembleRespondTime", "EnsembleMutualInformation"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}_count"))
        assert f'ModelName="{MODEL}"' in line
        assert float(line.rsplit(" ", 1)[1]) > 0
    refused = [line for line in text.splitlines() if line.startswith("EnsembleRefusedRequests{")]
    own = ('Status="400"', 'Reason="unreadable"', 'ModelVersion="1.0"', f'ModelName="{MODEL}"')
    assert any(all(label in line for label in own) for line in refused)


def test_no_request_content_or_path_in_the_log(server: TorchServe) -> None:
    server.predict(content=b"a very private sentence", headers={"Content-Type": "text/plain"})
    assert "very private" not in server.logs()
