"""An archive and rows -> rows per second of every way to answer all of them, and whether the answers agree."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.measuring.measure import describe_machine, use_threads, write_json
from benchmarks.measuring.vmap_comparison import perturb
from benchmarks.runs.bert_vmap import find_default_model
from benchmarks.serve.archives import SUBJECTS, pack_block, write_members
from scripts.private_torchserve import TorchServe
from training.runs.mnist_data import SAMPLE_DIR, load_digits
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError
from vmap_ensemble.tasks.answers import Answer

TOLERANCE = 1e-4  # absolute, of a probability
SHORTEST, LONGEST = 5, 100  # tokens of a text
SEED = 0


@dataclass(frozen=True)
class Subject:
    """What is answered.

    Attributes:
        archive: Of all members.
        rows: Bodies of requests, as `predict_many` and a server take them.
        plain: Rows -> (B, C) mean probabilities of a loop over the members, as one would write it.
    """

    archive: Path
    rows: Sequence[bytes]
    plain: Callable[[list[bytes]], Tensor]


def make_digits(count: int, members: int, folder: Path) -> Subject:
    """PNG files of the repository's digits, over and over."""
    digits = load_digits(SAMPLE_DIR, "test").images
    subject = SUBJECTS["mnist"]
    files = write_members(subject, members, folder)
    networks = []
    for file in files:
        networks.append(subject.build().eval())
        networks[-1].load_state_dict(torch.load(file, weights_only=True))
    bodies = []
    path = folder / "digit.png"
    for index in range(min(count, len(digits))):
        Image.fromarray(digits[index].squeeze().numpy()).save(path)
        bodies.append(path.read_bytes())

    def plain(batch: list[bytes]) -> Tensor:
        images = []
        for body in batch:
            path.write_bytes(body)
            images.append(subject.transform(Image.open(path)))
        return mean_probabilities(networks, torch.stack(images))

    block = {"handler": subject.handler, "members": [str(file) for file in files]}
    return Subject(
        pack_block("ens", block, folder, no_check=True),
        [bodies[index % len(bodies)] for index in range(count)],
        plain,
    )


def make_texts(source: Path, count: int, members: int, folder: Path) -> Subject:
    """Texts of 5 to 100 tokens, of members that are copies of one encoder, perturbed, with heads of their own."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=4).eval()
    stored = model.state_dict()
    models = []
    for seed in range(members):
        model.load_state_dict(perturb(stored, seed))
        model.save_pretrained(folder / f"seed{seed}")
        tokenizer.save_pretrained(folder / f"seed{seed}")
        models.append(AutoModelForSequenceClassification.from_pretrained(folder / f"seed{seed}").eval())
    words = [word for word, _ in sorted(tokenizer.get_vocab().items()) if word.isascii() and word.isalpha()]
    lengths = torch.randint(SHORTEST - 2, LONGEST - 1, (count,))  # two tokens are [CLS] and [SEP]
    texts = [" ".join(words[i] for i in torch.randint(len(words), (int(length),)).tolist()) for length in lengths]

    def plain(batch: list[bytes]) -> Tensor:
        inputs = tokenizer([row.decode() for row in batch], padding=True, truncation=True, return_tensors="pt")
        return mean_probabilities([_logits_of(own) for own in models], inputs)

    block = {"handler": "bert_handler.py", "members": [str(folder / f"seed{seed}") for seed in range(members)]}
    return Subject(pack_block("ens", block, folder, no_check=True), [text.encode() for text in texts], plain)


def _logits_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda inputs: model(**inputs).logits


def mean_probabilities(members: Sequence[Callable[[Any], Tensor]], inputs: Any) -> Tensor:
    """(B, C), the members run one after another."""
    return torch.stack([member(inputs).softmax(-1) for member in members]).mean(0)


@torch.inference_mode()
def answer_plainly(subject: Subject, batch_size: int) -> Tensor:
    """(N,) the largest probability of each row, by a DataLoader that takes rows in their order."""
    loader: DataLoader[Tensor] = DataLoader(subject.rows, batch_size, collate_fn=subject.plain)  # type: ignore[arg-type]
    return torch.cat([probabilities.amax(-1) for probabilities in loader])


def answer_ours(ensemble: Ensemble, subject: Subject) -> Tensor:
    """The same by `predict_many`."""
    answers = list(ensemble.predict_many(subject.rows))
    for answer in answers:
        if isinstance(answer, ItemError):
            raise answer
    return _most_probable([answer.body for answer in answers if isinstance(answer, Answer)])


def answer_served(client: httpx.Client, subject: Subject) -> Tensor:
    """The same of TorchServe, one request behind the other, by a client that keeps its connection."""
    replies = [client.post("/predictions/ens", content=row) for row in subject.rows]
    return _most_probable([reply.raise_for_status().json() for reply in replies])


def _most_probable(answers: list[Any]) -> Tensor:
    return torch.tensor([answer["top_k"][0]["probability"] for answer in answers])


def timed(answer: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it answers, and in how many seconds."""
    started = time.perf_counter()
    answers = answer()
    return answers, time.perf_counter() - started


def compare(title: str, subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way; the plain DataLoader runs before and behind ours, so that a busy machine shows."""
    ensemble = Ensemble.load(subject.archive, threads=options.threads)
    first = Subject(subject.archive, subject.rows[: 4 * options.batch_size], subject.plain)
    answer_plainly(first, options.batch_size)
    answer_ours(ensemble, first)
    want, before_s = timed(lambda: answer_plainly(subject, options.batch_size))
    got, ours_s = timed(lambda: answer_ours(ensemble, subject))
    _, after_s = timed(lambda: answer_plainly(subject, options.batch_size))
    count = len(subject.rows)
    rows: list[dict[str, Any]] = [
        {"way": "plain DataLoader", "rows": count, "rows_per_s": 2 * count / (before_s + after_s), "difference": 0.0},
        {"way": "ours", "rows": count, "rows_per_s": count / ours_s, "difference": float((got - want).abs().max())},
    ]
    if options.asked:
        asked = Subject(subject.archive, subject.rows[: options.asked], subject.plain)
        with TorchServe({"ens": subject.archive}, timeout_s=600) as server, server.client() as client:
            answer_served(client, Subject(subject.archive, asked.rows[:20], subject.plain))
            served, served_s = timed(lambda: answer_served(client, asked))
        count, difference = len(asked.rows), float((served - want[: len(asked.rows)]).abs().max())
        rows.append(
            {"way": "one request per row", "rows": count, "rows_per_s": count / served_s, "difference": difference}
        )
    return [{"subject": title, **row, "ours_has": rows[1]["rows_per_s"] / row["rows_per_s"]} for row in rows]


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where answers differ."""
    use_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for title in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if title == "digits":
                subject = make_digits(options.digits, options.members, folder)
            else:
                source = options.model_path or find_default_model()
                subject = make_texts(source, options.texts, options.members, folder)
            rows += compare(title, subject, options)
    for row in rows:
        print(
            f"{row['subject']:8} {row['way']:20} {row['rows']:6} rows  {row['rows_per_s']:8.1f} rows/s   ours has "
            f"{row['ours_has']:.2f}x   probabilities differ by {row['difference']:.0e}"
        )
    if options.json:
        write_json(options.json, machine, [], table="offline", rows=rows)
    different = [row for row in rows if not row["difference"] <= TOLERANCE]
    for row in different:
        print(f"error: {row['subject']}: {row['way']} differs by {row['difference']:.1e}", file=sys.stderr)
    return 1 if different else 0
