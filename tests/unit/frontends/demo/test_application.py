"""The application behind the page: its addresses, what it tells of an ensemble, and who is let in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("starlette")

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.frontends.demo.application import Demo
from vmap_ensemble.models.mnist import MnistNet


@pytest.fixture
def demo(make_archive, make_model) -> Demo:
    states = {f"m{seed}": make_model(MnistNet, seed).state_dict() for seed in range(3)}
    return Demo(Ensemble.load(make_archive(states, {"handler": "mnist_handler.py"})), "digits")


def request(demo: Demo, method: str, path: str, host: str = "127.0.0.1:8090", **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=demo.application())
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_answers_are_the_ensembles_own(demo: Demo, digit) -> None:
    headers = {"X-Ensemble-Detail": "members"}
    for method in ("POST", "PUT"):
        reply = request(demo, method, "/predictions/digits", content=digit(), headers=headers)
        (answer,) = demo.ensemble.predict([digit()], detail=True)
        assert (reply.status_code, reply.json()) == (200, json.loads(answer.to_json()))


def test_what_is_told_of_the_ensemble(demo: Demo) -> None:
    told = request(demo, "GET", "/about").json()
    assert told["name"] == "digits"
    assert told["members"] == ["m0", "m1", "m2"]
    assert (told["input"], told["sample"], told["explains"]) == ("picture", None, False)


def test_tensors_are_asked_as_json_and_their_sample_is_answered() -> None:
    states = {name: torch.nn.Linear(3, 2).state_dict() for name in "ab"}
    demo = Demo(Ensemble.of(torch.nn.Linear(3, 2), states, example=torch.zeros(1, 3)), "x")
    told = request(demo, "GET", "/about").json()
    assert told["input"] == "json"
    reply = request(demo, "POST", "/predictions/x", json=told["sample"])
    assert reply.status_code == 200, reply.text
    assert len(told["sample"]) == 3


def test_refusals_are_those_of_every_server(demo: Demo, digit) -> None:
    wrong = (
        (404, "POST", "/predictions/other", digit()),
        (405, "GET", "/predictions/digits", b""),
        (415, "POST", "/predictions/digits", b"no picture"),
        (501, "POST", "/explanations/digits", digit()),
    )
    for status, method, path, body in wrong:
        reply = request(demo, method, path, content=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, status), path


def test_figures_are_of_what_was_asked(demo: Demo, digit) -> None:
    request(demo, "POST", "/predictions/digits", content=digit())
    request(demo, "POST", "/predictions/digits", content=b"no picture")
    told = request(demo, "GET", "/figures").json()
    assert told["replies"] == {"200": 1, "415": 1}
    assert sum(told["requests"]) == 2
    assert told["items_in_a_forward"] == 1
    assert told["forward_ms"] > 0


def test_another_sites_name_is_refused_and_nothing_comes_from_elsewhere(demo: Demo) -> None:
    assert request(demo, "GET", "/", host="evil.example").status_code == 400
    assert request(demo, "GET", "/", host="localhost:8090").status_code == 200
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        reply = request(demo, "GET", path)
        assert reply.headers["content-type"].startswith(kind)
        assert reply.headers["content-security-policy"].startswith("default-src 'self';")
        assert "https:" not in reply.text
