"""Clients against a server of the standard library: what is sent, what is tried again, what order answers have."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")

from vmap_ensemble.client import AsyncClient, Client, Prediction, Refused  # noqa: E402
from vmap_ensemble.client import http as client_http  # noqa: E402
from vmap_ensemble.client.bodies import ClassAnswer  # noqa: E402

CAT = {"label": "cat", "index": 1, "probability": 0.75}
ENTROPIES = {"predictive_entropy": 0.6, "expected_entropy": 0.5, "mutual_information": 0.1, "agreement": 1.0}
BODY = {
    "prediction": CAT,
    "top_k": [CAT],
    "uncertainty": ENTROPIES,
    "ensemble": {"size": 1, "used": 1},
    "abstain": True,
    "abstain_reasons": ["probability below 0.8"],
    "members": [{"name": "m0", **CAT, "sha256": "0" * 64}],
    "archive": {"version": "1.0", "sha256": "0" * 64},
}


class Server(ThreadingHTTPServer):
    """Answers by a list of (status, body), then with BODY; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.script: list[tuple[int, Any]] = []
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, sent))
        status, body = self.server.script.pop(0) if self.server.script else (200, BODY)
        if callable(body):
            body = body(sent)
        if status == 0:
            self.close_connection = True
            return
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(client_http, "FIRST_PAUSE_S", 0.001)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(params=["in turn", "async"])
def call(request: pytest.FixtureRequest, server: Server) -> Any:
    """call(method, *args, client options=…) -> the result, with either client."""

    def in_turn(method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        with Client(server.url, "ens", **(client or {})) as made:
            return getattr(made, method)(*args, **options)

    def awaited(method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(server.url, "ens", **(client or {})) as made:
                return await getattr(made, method)(*args, **options)

        return asyncio.run(run())

    return in_turn if request.param == "in turn" else awaited


def test_an_answer_is_an_object(call: Any) -> None:
    answer = call("predict", b"file")
    assert answer == Prediction(BODY, "cat", 0.75, 0.1, True)


def test_what_is_sent(call: Any, server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    call("predict", tmp_path / "a.png", detail=True, subset=["a", "b"], top_k=3, client={"key": "secret"})
    call("predict", "a text")
    call("predict", {"question": "q", "context": "c"})
    server.script = [(200, [BODY, BODY, BODY])]
    answers = call("predict", ["a text", b"png", {"text": "x", "subset": ["a"]}])
    call("explain", "a text", subset=["a"])
    assert [answer.label for answer in answers] == ["cat"] * 3
    (path, headers, body), (_, text_headers, text), (_, _, pair), (_, _, several), (explained, _, _) = server.seen
    assert (path, body, explained) == ("/predictions/ens", b"png", "/explanations/ens")
    wanted = {"x-ensemble-detail": "members", "x-ensemble-subset": "a,b", "x-ensemble-top-k": "3"}
    assert {key: headers[key] for key in wanted} == wanted
    assert headers["authorization"] == "Bearer secret"
    assert text_headers["content-type"] == "application/json"
    assert "authorization" not in text_headers
    assert json.loads(text) == {"text": "a text"}
    assert json.loads(pair) == {"question": "q", "context": "c"}
    assert json.loads(several) == [
        {"text": "a text"},
        {"b64": base64.b64encode(b"png").decode()},
        {"text": "x", "subset": ["a"]},
    ]


@pytest.mark.parametrize("first", [(503, {"code": 503, "message": "no worker"}), (0, None)])
def test_a_full_queue_and_a_lost_connection_are_tried_again(call: Any, server: Server, first: Any) -> None:
    server.script = [first, first]
    assert call("predict", b"x").label == "cat"
    assert len(server.seen) == 3
    server.script = [first] * 3
    with pytest.raises(Refused) as error:
        call("predict", b"x", client={"retries": 2})
    assert error.value.status == first[0]


@pytest.mark.parametrize("status", [400, 413, 415, 422, 500, 507])
def test_a_refusal_is_not_tried_again(call: Any, server: Server, status: int) -> None:
    server.script = [(status, {"error": {"code": status, "message": "why"}})]
    with pytest.raises(Refused, match=f"{status}: why") as error:
        call("predict", b"x")
    assert (error.value.status, error.value.message, len(server.seen)) == (status, "why", 1)


def test_torchserves_own_words_and_no_json(call: Any, server: Server) -> None:
    server.script = [(404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: ens"})]
    with pytest.raises(Refused, match="404: Model not found: ens"):
        call("predict", b"x")


def test_a_time_that_is_up_is_not_tried_again(call: Any, server: Server) -> None:
    server.script = [(200, lambda _sent: time.sleep(0.5) or BODY)]
    with pytest.raises(Refused, match="ReadTimeout"):
        call("predict", b"x", client={"timeout_s": 0.1})
    assert len(server.seen) == 1


def test_a_batch_is_in_order_with_errors_in_place(call: Any, server: Server) -> None:
    def echo(sent: bytes) -> dict[str, Any]:
        number = int(sent)
        time.sleep(0.02 * (5 - number % 5))
        return {"prediction": {"label": str(number)}}

    server.script = [(200, echo)] * 20
    answers = call("predict_batch", [str(i).encode() for i in range(20)], concurrency=5)
    assert [answer.label for answer in answers] == [str(i) for i in range(20)]
    server.script = [(415, {"error": {"code": 415, "message": "no image"}})]
    (refused,) = call("predict_batch", [b"0"], concurrency=1)
    assert (type(refused), refused.status) == (Refused, 415)


def test_no_server_is_a_refusal_without_a_status() -> None:
    with Client("http://127.0.0.1:9", "ens", retries=0) as client, pytest.raises(Refused) as error:
        client.predict(b"x")
    assert error.value.status == 0


def test_answers_of_other_modes() -> None:
    assert Prediction.of({"embedding": [0.1], "uncertainty": {"spread": 0.2}}).label is None
    assert Prediction.of({"predictions": []}).mutual_information is None
    assert Prediction.of({"prediction": [1, 2]}).probability is None


def test_the_client_needs_no_torch() -> None:
    script = "import sys, vmap_ensemble.client; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_body_that_says_what_no_answer_says_is_refused() -> None:
    assert ClassAnswer.model_validate(BODY).abstain_reasons == BODY["abstain_reasons"]
    for change in ({"abstain": False}, {"abstain": 1}, {"more": 1}, {"uncertainty": {**ENTROPIES, "agreement": 1.1}}):
        with pytest.raises(ValueError, match="ClassAnswer"):
            ClassAnswer.model_validate({**BODY, **change})


def test_the_blocks_of_the_page_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "clients.md").read_text(encoding="utf-8")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        if "GrpcClient" not in block:  # tests/server asks a real one
            exec(block.replace("http://127.0.0.1:8080", server.url), {})
    assert len(server.seen) >= 3
