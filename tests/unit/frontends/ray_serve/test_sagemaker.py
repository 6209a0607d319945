"""SageMaker's addresses of one archive: what they ask, and that /ping says what a prediction would."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

pytest.importorskip("ray")

from starlette.requests import Request

from vmap_ensemble.frontends.door import Taken
from vmap_ensemble.frontends.ray_serve.sagemaker import SageMakerDoor
from vmap_ensemble.serving.batch import Reply


async def answer(taken: Taken) -> Reply:
    return Reply(200, f'"{taken.asks} {taken.body.decode()}"')


def ask(method: str, path: str, error: Exception | None = None, **request: Any) -> httpx.Response:
    async def check() -> None:
        if error:
            raise error

    door = SageMakerDoor("ens", answer, 100, check)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        response = await door(Request(scope, receive))
        await response(scope, receive, send)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://image") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/", "/invocations", "/predictions/ens"])
def test_bodies_reach_the_model(path: str) -> None:
    assert ask("POST", path, content=b"a").json() == "predict a"
    assert ask("POST", path, content=b"a" * 101).status_code == 413
    assert ask("GET", path).status_code == 405


def test_custom_attributes_ask_for_more_than_a_prediction() -> None:
    for told, asks in (("explain", "explain"), ("describe", "describe"), ("trace=7", "predict")):
        reply = ask("POST", "/invocations", content=b"a", headers={"X-Amzn-SageMaker-Custom-Attributes": told})
        assert reply.json() == f"{asks} a"


def test_ping_is_a_real_prediction(caplog: pytest.LogCaptureFixture) -> None:
    assert (ask("GET", "/ping").status_code, ask("GET", "/ping").content) == (200, b"")
    assert ask("GET", "/ping", RuntimeError("CUDA error")).status_code == 503
    assert "the sample input isn't answered: RuntimeError" in caplog.text
    assert ask("POST", "/nowhere").status_code == 404
