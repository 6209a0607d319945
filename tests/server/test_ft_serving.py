"""A real TorchServe serves traced members: traced in one process, loaded in a worker, equal to Hugging Face."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from archiver.__main__ import main as archive
from fastertransformer.tracing import trace_checkpoint
from scripts.private_torchserve import ROOT, TorchServe
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

TEXTS = ["a great movie", "bad", "sarah lives in new york . great bad movie", "what is it ?"]
QUESTIONS = [
    {"question": "what is it ?", "context": "sarah lives in new york . it is great"},
    {"question": "what", "context": "a movie"},
    {"question": "sarah lives", "context": "bad movie . it is a great movie . what is it"},
]
Members = dict[str, Any]


def save_members(folder: Path, mode: str) -> tuple[Members, Any]:
    """Two tiny random models as save_pretrained writes them, and their tokenizer."""
    config = CONFIGS["bert"]()
    config.max_position_embeddings = 128  # the max_length of the block
    members = random_members(mode, config, 2)
    for name, member in members.items():
        member.save_pretrained(folder / name)
        tokenizer = save_tokenizer(folder / name, token_types=True)
    return members, tokenizer


def build(folder: Path, name: str, members: list[str], pretrained: Path | None = None) -> Path:
    """Build one of the two archives of setup_config.json with other members."""
    command = [name, "--members", *members, "--output", str(folder)]
    assert archive([*command, *(["--pretrained", str(pretrained)] if pretrained else [])]) == 0
    return folder / f"{name}.mar"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Members, Any]]:
    folder = tmp_path_factory.mktemp("models")
    modes = {"seqcls": "sequence_classification", "qa": "question_answering"}
    return {name: (folder / name, *save_members(folder / name, mode)) for name, mode in modes.items()}


@pytest.fixture(scope="module")
def server(
    models: dict[str, tuple[Path, Members, Any]], ft_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    """Classifiers from Hugging Face directories, which the archiver traces; traced files of our own for questions."""
    store = tmp_path_factory.mktemp("store")
    seqcls = build(store, "ft_bert_seqcls", [str(models["seqcls"][0])])
    folder, members, _ = models["qa"]
    files = []
    for name, member in members.items():
        files.append(store / f"{name}.pt")
        trace_checkpoint(copy.deepcopy(member), "question_answering", files[-1], max_length=64)
    qa = build(store, "ft_bert_qa", [str(file) for file in files], folder / next(iter(members)))
    # A long delay, so that requests sent together do share a batch.
    batching = {"batchSize": 8, "maxBatchDelay": 200}
    with TorchServe({"seqcls": seqcls, "qa": qa}, batching=batching) as running:
        yield running


@torch.no_grad()
def run_plain(members: Members, tokenizer: Any, *texts: str) -> list[Any]:
    """What Hugging Face's own loop over the members gives for one input, without padding."""
    inputs = tokenizer(*texts, return_tensors="pt")
    return [member(**inputs) for member in members.values()]


def check_labels(answer: dict[str, Any], members: Members, tokenizer: Any, text: str) -> None:
    expected = torch.stack([output.logits[0].softmax(0) for output in run_plain(members, tokenizer, text)]).mean(0)
    assert answer["ensemble"] == {"size": 2, "used": 2}
    assert len(answer["top_k"]) == len(expected)
    for row in answer["top_k"]:
        assert row["probability"] == pytest.approx(expected[row["index"]].item(), abs=1e-5)


def check_span(answer: dict[str, Any], members: Members, tokenizer: Any, item: dict[str, str]) -> None:
    """The best span by the mean of the members' start and end probabilities over context and first token."""
    encoded = tokenizer(item["question"], item["context"], return_offsets_mapping=True)
    allowed = torch.tensor([i == 0 or s == 1 for i, s in enumerate(encoded.sequence_ids())])
    sides = []
    for key in ("start_logits", "end_logits"):
        logits = torch.stack(
            [output[key][0] for output in run_plain(members, tokenizer, item["question"], item["context"])]
        )
        sides.append(logits.masked_fill(~allowed, -torch.inf).softmax(1).mean(0))
    scores = (sides[0][:, None] * sides[1]).triu()
    assert answer["no_answer"]["score"] == pytest.approx(scores[0, 0].item(), abs=1e-5)
    scores[0] = 0
    first, last = divmod(int(scores.argmax()), len(allowed))
    best = answer["top_k"][0]
    assert best["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    start, end = encoded["offset_mapping"][first][0], encoded["offset_mapping"][last][1]
    assert (best["start"], best["end"], best["answer"]) == (start, end, item["context"][start:end])


def test_a_batch_with_bad_requests_in_it(server: TorchServe, models: dict[str, tuple[Path, Members, Any]]) -> None:
    bad: list[tuple[str, Any, int]] = [
        ("seqcls", {"content": b""}, 400),
        ("seqcls", {"content": b"\xff\xfe"}, 400),
        ("qa", {"json": {"question": "what"}}, 400),
        ("qa", {"json": {"question": "what " * 80, "context": "a movie"}}, 400),
    ]
    jobs = [("seqcls", {"content": text.encode()}, 200) for text in TEXTS]
    jobs += [("qa", {"json": item}, 200) for item in QUESTIONS] + bad
    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = list(pool.map(lambda job: server.predict(job[0], **job[1]), jobs))
    assert [reply.status_code for reply in replies] == [status for _, _, status in jobs]
    answers = [reply.json() for reply in replies]
    for text, answer in zip(TEXTS, answers, strict=False):
        check_labels(answer, *models["seqcls"][1:], text)
    for item, answer in zip(QUESTIONS, answers[len(TEXTS) :], strict=False):
        check_span(answer, *models["qa"][1:], item)
    for answer in answers[-len(bad) :]:
        assert answer["error"]["code"] == 400


def test_explanations_are_a_501_that_names_the_way(server: TorchServe) -> None:
    with server.client() as client:
        reply = client.post("/explanations/seqcls", content=b"a movie")
    assert reply.status_code == 501
    assert "bert_handler.py" in reply.json()["error"]["message"]


def test_the_description_names_the_traced_members(server: TorchServe) -> None:
    description = server.describe("qa", customized=True)["customizedMetadata"]
    told = json.loads(description) if isinstance(description, str) else description
    assert [row["name"] for row in told["members"]] == ["m0", "m1"]
    assert told["equivalence"]["largest_difference"] < 1e-5


def test_every_block_is_served_by_the_handler_of_traced_members() -> None:
    blocks = json.loads((ROOT / "setup_config.json").read_text(encoding="utf-8"))
    for name in ("ft_bert_seqcls", "ft_bert_qa"):
        assert blocks[name]["handler"] == "ft_bert_handler.py"
        assert blocks[name]["FasterTransformer"] is True
