"""The recorded requests: every way to ask two archives, and what must be refused; each server gets the same.

`recorded_archives` and `recorded_answers` (conftest.py) are the archives, and TorchServe's answers to each alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.server import bad_images, bad_texts
from tests.server import bad_inputs as bad
from tests.server.test_bad_inputs import assert_close

SHAPE = (1, 28, 28)
# A limit of bodies that is passed cheaply.
MOST_BYTES = 200_000
# Path and request.
Recorded = tuple[str, bad.Sent]


def requests() -> list[Recorded]:
    """Path and request: every way to ask, and what must be refused."""
    rng = random.Random(0)
    texts, explained = bad_texts.text_makers(bad_texts.text_item), bad_texts.explanation_makers(bad_texts.text_item)
    png = bad_images.png(rng)
    own = [
        {"content": png, "headers": {"Content-Type": "image/png", "X-Ensemble-Detail": "members"}},
        {"content": png, "headers": {"describe": "False", "x-ensemble-top-k": "1"}},
        {"files": [("data", png), ("data", png)]},
        {"files": {"data": ("a.json", json.dumps(bad_images.base64_item(rng)), "application/json")}},
        {"files": {"data": ("a.txt", "a text", "text/plain"), "subset": (None, "m0")}},
        {"data": {"form": "lost"}},
    ]
    kinds = {
        "/predictions/mnist": [
            *bad_images.good_images(rng, SHAPE, 8),
            *bad.make_bad(rng, bad_images.image_makers(SHAPE), 60),
            *(bad.Sent("own", (), request) for request in own),
        ],
        "/explanations/mnist": [bad.Sent("not offered", (501,), {"content": png})],
        "/predictions/bert": [
            *bad_texts.good_texts(rng, bad_texts.text_item, 7),
            *bad.make_bad(rng, texts, 40),
            bad.Sent("plain", (200,), {"content": "größe", "headers": {"Content-Type": "text/plain"}}),
        ],
        "/explanations/bert": [
            *(bad.Sent("good", (200,), bad.as_json(bad_texts.text_item(rng))) for _ in range(2)),
            *bad.make_bad(rng, explained, 15),
        ],
    }
    return [(path, one) for path, sent in kinds.items() for one in sent]


REQUESTS = requests()


def ask_all(client: httpx.Client, requests: Sequence[Recorded], clients: int) -> list[httpx.Response]:
    """The replies, in order; so many are asked at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda one: client.post(one[0], **one[1].request), requests))


def check_answers(
    requests: Sequence[Recorded], replies: Sequence[httpx.Response], expected: Sequence[httpx.Response]
) -> None:
    """The same statuses, and bodies that are equal but for the rounding of numbers."""
    for (path, one), got, wanted in zip(requests, replies, expected, strict=True):
        assert got.status_code == wanted.status_code, (path, one.kind, got.text[:200], wanted.text[:200])
        assert got.headers["content-type"] == "application/json"
        assert_close(got.json(), wanted.json(), f"{path}: {one.kind}")
