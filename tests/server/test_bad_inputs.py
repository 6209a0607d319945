"""Bad requests among good ones, for each handler on a real TorchServe: none that is good is lost or answered wrongly.

BAD_INPUTS says how many for each handler; from 1000 on, a thorough run, every text mode is tried.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torchvision

pytest.importorskip("transformers")

from archiver.__main__ import main as archive
from scripts.private_torchserve import TorchServe
from tests.server import bad_images, bad_texts
from tests.server import bad_inputs as bad
from tests.unit.tasks.text.test_encoder_task import BIO, CONFIGS, random_members, save_tokenizer
from vmap_ensemble.models.mnist import MnistNet

COUNT = int(os.environ.get("BAD_INPUTS", "150"))
pytestmark = pytest.mark.timeout(300 + COUNT)
thorough = pytest.mark.skipif(COUNT < 1000, reason="only with BAD_INPUTS=1000 or more")
CLIENTS = 16
MOST_BYTES = 4096
# Small images, so that a batch costs little; the classes are the members'.
RESNET_SHAPE = (3, 32, 32)
IMAGES = {"max_pixels": bad.MAX_PIXELS, "max_request_pixels": 2 * bad.MAX_PIXELS, "execution": "eager"}
TEXTS = {
    "max_characters": bad.MAX_CHARACTERS,
    "max_request_tokens": bad.MAX_REQUEST_TOKENS,
    "max_explanations": bad.MAX_EXPLANATIONS,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "mnist": {"handler": "mnist_handler.py", "architecture": "mnist", **IMAGES},
    "resnet": {
        "handler": "resnet_handler.py",
        "architecture": "torchvision:resnet18",
        "num_classes": 5,
        "input_shape": list(RESNET_SHAPE),
        **IMAGES,
    },
    **{
        name: {"handler": "bert_handler.py", "mode": mode, "execution": "eager", "explanation_steps": 4, **TEXTS}
        for name, mode in {
            "bert": "sequence_classification",
            "tokens": "token_classification",
            "questions": "question_answering",
            "masks": "fill_mask",
        }.items()
    },
    "ft_bert": {
        "handler": "ft_bert_handler.py",
        "FasterTransformer": True,
        "save_mode": "torchscript",
        "mode": "sequence_classification",
        "max_length": 64,
        **TEXTS,
    },
}


def tiny_resnet() -> torch.nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def save_images(folder: Path, build: Callable[[], torch.nn.Module]) -> list[Path]:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(folder / f"m{seed}.pt")
        torch.save(build().state_dict(), paths[-1])
    return paths


def save_texts(folder: Path, mode: str) -> list[Path]:
    labels = {"token_classification": {"id2label": BIO}, "sequence_classification": {"num_labels": 3}}
    config = CONFIGS["bert"](**labels.get(mode, {}))
    for name, member in random_members(mode, config, 2).items():
        member.save_pretrained(folder / name)
        save_tokenizer(folder / name, token_types=True)
    return [folder]


def build_archive(folder: Path, name: str) -> Path:
    """One of the blocks with two random members, m0 and m1."""
    block = BLOCKS[name]
    if "mode" in block:
        members = save_texts(folder / name, block["mode"])
    else:
        (folder / name).mkdir()
        members = save_images(folder / name, MnistNet if name == "mnist" else tiny_resnet)
    config = folder / f"{name}.json"
    config.write_text(json.dumps({name: block}), encoding="utf-8")
    command = [name, "--no-check", "--config", str(config), "--members", *map(str, members), "--output", str(folder)]
    assert archive(command) == 0
    return folder / f"{name}.mar"


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], TorchServe]]:
    """A server of one archive; the one before it is stopped when another is asked for."""
    running: dict[str, TorchServe] = {}

    def start(name: str) -> TorchServe:
        if name not in running:
            for server in running.values():
                server.close()
            running.clear()
            mar = build_archive(tmp_path_factory.mktemp(name), name)
            # A delay, so that the clients' requests share batches.
            server = TorchServe({name: mar}, batching={"batchSize": 8, "maxBatchDelay": 10})
            running[name] = server.__enter__()
        return running[name]

    yield start
    for server in running.values():
        server.close()


def ask_all(client: httpx.Client, path: str, sent: Sequence[bad.Sent], clients: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda one: client.post(path, **one.request), sent))


def assert_close(got: Any, expected: Any, where: str = "answer") -> None:
    """Equal but for the rounding of numbers."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(got[index], value, f"{where}[{index}]")
    elif isinstance(expected, str) and expected.startswith("{"):  # KServe v2 answers with texts of JSON
        assert_close(json.loads(got), json.loads(expected), where)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    else:
        assert got == expected, where


def check_refusal(one: bad.Sent, reply: httpx.Response) -> str | None:
    """What is wrong with the reply to a bad request; None if nothing is."""
    try:
        told = reply.json()["error"]
        fits = told["code"] == reply.status_code in one.statuses and isinstance(told["message"], str)
    except (ValueError, KeyError, TypeError):
        fits = False
    if fits and told["message"] and len(reply.content) < MOST_BYTES:
        return None
    return f"{one.kind}: {reply.status_code}, expected {one.statuses}: {reply.text[:200]}"


def check_storm(server: TorchServe, path: str, good: list[bad.Sent], wrong: list[bad.Sent], share: int = 1) -> None:
    """Ask all at once; good requests are answered as they are alone, bad ones refused with a reason.

    Args:
        server: Serves the model that the path ends with.
        path: Where all are sent.
        good: Sent again and again.
        wrong: Each sent once.
        share: So many bad ones to a good one.
    """
    name = path.rsplit("/", 1)[1]
    workers = [worker["pid"] for worker in server.describe(name)["workers"]]
    with server.client() as client:
        alone = ask_all(client, path, good, 1)
        assert {reply.status_code for reply in alone} == {200}, [reply.text[:200] for reply in alone]
        repeated = list(itertools.islice(itertools.cycle(range(len(good))), len(wrong) // share))
        jobs = [(one, None) for one in wrong] + [(good[index], index) for index in repeated]
        random.Random(1).shuffle(jobs)
        replies = ask_all(client, path, [one for one, _ in jobs], CLIENTS)
    failures = []
    for (one, index), reply in zip(jobs, replies, strict=True):
        if index is None:
            failures.append(check_refusal(one, reply))
            continue
        assert reply.status_code == 200, reply.text[:400]
        assert_close(reply.json(), alone[index].json())
    failures = [failure for failure in failures if failure]
    assert not failures, f"{len(failures)} of {len(wrong)}:\n" + "\n".join(failures[:40])
    assert [worker["pid"] for worker in server.describe(name)["workers"]] == workers
    assert "request could not be answered" not in server.logs()


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("resnet", RESNET_SHAPE)])
def test_images(serve: Callable[[str], TorchServe], name: str, shape: tuple[int, ...]) -> None:
    rng = random.Random(0)
    wrong = bad.make_bad(rng, bad_images.image_makers(shape), COUNT)
    check_storm(serve(name), f"/predictions/{name}", bad_images.good_images(rng, shape, 24), wrong)


ITEMS = {
    "bert": bad_texts.text_item,
    "tokens": bad_texts.text_item,
    "questions": bad_texts.question_item,
    "masks": bad_texts.mask_item,
    "ft_bert": bad_texts.text_item,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=thorough) if name in ("tokens", "questions", "masks") else name for name in ITEMS],
)
def test_texts(serve: Callable[[str], TorchServe], name: str, request: pytest.FixtureRequest) -> None:
    if name == "ft_bert":
        request.getfixturevalue("ft_library")
    rng = random.Random(0)
    wrong = bad.make_bad(rng, bad_texts.text_makers(ITEMS[name]), COUNT)
    check_storm(serve(name), f"/predictions/{name}", bad_texts.good_texts(rng, ITEMS[name], 21), wrong)


def test_explanations(serve: Callable[[str], TorchServe]) -> None:
    rng = random.Random(0)
    wrong = bad.make_bad(rng, bad_texts.explanation_makers(bad_texts.text_item), COUNT)
    good = [bad.Sent("good", (200,), bad.as_json(bad_texts.text_item(rng))) for _ in range(6)]
    check_storm(serve("bert"), "/explanations/bert", good, wrong, share=5)
