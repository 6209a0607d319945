"""KServe's SDK serves real archives: recorded requests by v1, v2 and gRPC, probes that predict, shared forwards."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

pytest.importorskip("kserve")
pytest.importorskip("transformers")

from kserve import InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.server import bad_images
from tests.server import bad_inputs as bad
from tests.server.curl_lines import ask_as_written
from tests.server.kserve_process import KServe
from tests.server.recorded import MOST_BYTES, REQUESTS, Recorded, ask_all, check_answers
from tests.server.test_bad_inputs import assert_close

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server(recorded_archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[KServe]:
    folder = tmp_path_factory.mktemp("models")
    for path in recorded_archives.values():
        (folder / path.name).symlink_to(path)
    with KServe(folder, "--max_request_bytes", str(MOST_BYTES), "--enable_latency_logging", "false") as running:
        yield running
        assert running.stop() == 0  # by the signal that Kubernetes sends


@pytest.fixture
def client(server: KServe) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def stub(server: KServe) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield GRPCInferenceServiceStub(channel)


def is_v2(one: bad.Sent) -> bool:
    content = one.request.get("content")
    return isinstance(content, bytes) and content.startswith(b'{"inputs"')


def by_kserve(recorded: Recorded) -> Recorded:
    """The same request at the address that KServe's protocol has for it."""
    path, one = recorded
    kind, name = path.removeprefix("/").split("/")
    if kind == "explanations":
        return f"/v1/models/{name}:explain", one
    return f"/v2/models/{name}/infer" if is_v2(one) else f"/v1/models/{name}:predict", one


def test_answers_are_torchserves(
    client: httpx.Client, server: KServe, recorded_answers: list[httpx.Response]
) -> None:
    for requests in (REQUESTS, [by_kserve(recorded) for recorded in REQUESTS]):
        check_answers(requests, ask_all(client, requests, 16), recorded_answers)
    assert "could not be answered" not in server.log()


def to_grpc(recorded: Recorded) -> pb.ModelInferRequest | None:
    """The same request over gRPC; None for one that its messages can't hold."""
    path, one = recorded
    if not is_v2(one):
        return None
    body = json.loads(one.request["content"])
    try:
        inputs = [InferInput(**{"parameters": {}, **tensor}) for tensor in body["inputs"]]
        name = path.rpartition("/")[2]
        request = InferRequest(name, inputs, body.get("id", ""), parameters=body.get("parameters"))
        for tensor in inputs:
            tensor.data = flat(tensor.data)
        return request.to_grpc()
    except Exception:
        return None


def flat(data: Any) -> list[Any]:
    return [value for part in data for value in (flat(part) if isinstance(part, list) else [part])]


def test_grpc_gives_the_same(stub: GRPCInferenceServiceStub, recorded_answers: list[httpx.Response]) -> None:
    seen = set()
    for recorded, expected in zip(REQUESTS, recorded_answers, strict=True):
        request = to_grpc(recorded)
        if request is None:
            continue
        seen.add(expected.status_code)
        if expected.status_code == 200:
            assert_close(outputs_of(stub.ModelInfer(request)), expected.json()["outputs"], recorded[1].kind)
            continue
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request)
        assert json.loads(refused.value.details()) == expected.json(), recorded[1].kind
    assert len(seen) > 1
    assert 200 in seen


def outputs_of(response: pb.ModelInferResponse) -> list[dict[str, Any]]:
    return [
        {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
            "data": [value.decode() for value in output.contents.bytes_contents],
        }
        for output in response.outputs
    ]


def test_grpc_takes_pictures_options_and_raw_tensors(client: httpx.Client, stub: GRPCInferenceServiceStub) -> None:
    png = bad_images.png(random.Random(1))
    expected = client.post("/predictions/mnist", content=png, headers={"X-Ensemble-Top-K": "2"}).json()
    contents = pb.InferTensorContents(bytes_contents=[png])
    picture = pb.ModelInferRequest.InferInputTensor(name="x", datatype="BYTES", shape=[1], contents=contents)
    request = pb.ModelInferRequest(model_name="mnist", inputs=[picture], id="7")
    response = stub.ModelInfer(request, metadata=[("x-ensemble-top-k", "2")])
    assert response.id == "7"
    assert_close(json.loads(outputs_of(response)[0]["data"][0]), expected)

    pixels = [index / 784 for index in range(784)]
    tensor = {"name": "x", "datatype": "FP64", "shape": [1, 1, 28, 28]}
    expected = client.post("/v2/models/mnist/infer", json={"inputs": [{**tensor, "data": pixels}]}).json()
    raw = pb.ModelInferRequest(
        model_name="mnist",
        inputs=[pb.ModelInferRequest.InferInputTensor(**tensor)],
        raw_input_contents=[np.array(pixels).tobytes()],
    )
    assert_close(outputs_of(stub.ModelInfer(raw)), expected["outputs"])
    raw.raw_input_contents[0] = b"\x00" * 9
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(raw)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert json.loads(refused.value.details())["error"]["code"] == 400


def test_what_only_the_sdk_reads_gets_the_same_answers(client: httpx.Client) -> None:
    pixels = np.linspace(0, 1, 784, dtype=np.float32)
    tensor = InferInput("x", [1, 1, 28, 28], "FP32")
    tensor.set_data_from_numpy(pixels.reshape(1, 1, 28, 28))
    body, length = InferRequest("mnist", [tensor], "9").to_rest()
    headers = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    binary = client.post("/v2/models/mnist/infer", content=body, headers=headers)
    plain = {"inputs": [{"name": "x", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": pixels.tolist()}]}
    expected = client.post("/v2/models/mnist/infer", json=plain).json()
    assert binary.status_code == 200, binary.text
    assert binary.json()["id"] == "9"
    told = [
        {key: output[key] for key in ("name", "datatype", "shape", "data")} for output in binary.json()["outputs"]
    ]
    assert_close(told, expected["outputs"])

    event = {"ce-id": "1", "ce-source": "test", "ce-type": "x", "ce-specversion": "1.0"}
    for text, status in (("a great movie", 200), ("", 400)):
        instances = {"instances": [{"text": text}]}
        reply = client.post("/v1/models/bert:predict", json=instances, headers=event)
        same = client.post("/v1/models/bert:predict", json=instances)
        assert (reply.status_code, same.status_code) == (status, status)
        assert_close(reply.json(), same.json())
        assert ("ce-id" in reply.headers) == (status == 200)


def test_what_is_no_request_of_a_model(client: httpx.Client) -> None:
    for method, path, status in (
        ("POST", "/v1/models/nobody:predict", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/v1/models/mnist:predict", 405),
        ("GET", "/predictions/mnist", 405),
    ):
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, status), path
    large = client.post("/v1/models/mnist:predict", content=b"x" * (MOST_BYTES + 1))
    assert large.status_code == 413
    assert client.get("/v2/models/nobody/ready").status_code == 404


def batches(client: httpx.Client) -> tuple[float, float]:
    """Sum and count of the sizes of mnist's batches."""
    page = client.get("/metrics").text
    found = [
        re.search(rf'^EnsembleBatchSize_{part}\{{.*ModelName="mnist".*\}} (.*)$', page, re.M)
        for part in ("sum", "count")
    ]
    return float(found[0][1]), float(found[1][1])  # type: ignore[index]


def test_probes_predict_and_requests_share_forwards(client: httpx.Client, stub: GRPCInferenceServiceStub) -> None:
    for path in ("/v2/health/ready", "/v2/models/mnist/ready", "/v1/models/bert"):
        assert client.get(path).json()["ready"] is True
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    png = bad_images.png(random.Random(2))
    alone = client.post("/predictions/mnist", content=png).json()
    before = batches(client)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: client.post("/predictions/mnist", content=png), range(48)))
    after = batches(client)
    for reply in replies:
        assert_close(reply.json(), alone)
    assert after[0] - before[0] == 48
    assert after[1] - before[1] < 48
    assert "EnsembleRefusedRequests_total{" in client.get("/metrics").text


def test_the_lines_of_the_page_are_answered(server: KServe) -> None:
    for page in ("docs/kserve.md", "docs/moving.md"):
        answers = ask_as_written(page, "http://127.0.0.1:8080", server.url, "mnist")
        assert len(answers) == 2
        assert all(answer.keys() & {"prediction", "predictions", "ready"} for answer in answers)
