"""Questions -> trained members that answer them, scored by torchmetrics."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training.runs.bert import BATCH_SIZE, DemoError, find_weights, fit, silence_transformers, unfreeze
from training.runs.timed import run_training
from vmap_ensemble.archive.settings import parse_settings
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.text.mode import Window, pad_windows
from vmap_ensemble.tasks.text.question_answering import QuestionAnswering
from vmap_ensemble.tasks.text.settings import TextSettings

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
EPOCHS = 3
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Question:
    """One question with its context, and where in it (characters) the answer stands."""

    id: str
    question: str
    context: str
    answer: str
    start: int

    @property
    def item(self) -> dict[str, str]:
        """What a client would send."""
        return {"question": self.question, "context": self.context}


@dataclass(frozen=True)
class Score:
    """Percent of answers that are exactly right, and the mean overlap of their words with the right ones."""

    exact_match: float
    f1: float


def read_questions(path: Path) -> list[Question]:
    """Read a file in the format of SQuAD 1.1; of several answers to a question the first counts.

    Raises:
        DemoError: The file is missing or malformed, or an answer doesn't stand where it says.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        questions = [
            Question(qa["id"], qa["question"], paragraph["context"], answer["text"], answer["answer_start"])
            for title in data
            for paragraph in title["paragraphs"]
            for qa in paragraph["qas"]
            for answer in qa["answers"][:1]
        ]
    except OSError as error:
        raise DemoError(f"{path.name}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path.name}: expected the format of SQuAD 1.1 ({type(error).__name__}: {error})") from None
    for one in questions:
        if one.context[one.start : one.start + len(one.answer)] != one.answer:
            raise DemoError(f"{path.name}: question {one.id}: its answer doesn't stand at character {one.start}")
    if not questions:
        raise DemoError(f"{path.name}: holds no questions")
    return questions


def load_model(folder: Path, seed: int) -> Any:
    """The encoder with a head for start and end, whose first weights follow from the seed."""
    from transformers import AutoModelForQuestionAnswering

    silence_transformers()
    torch.manual_seed(seed)
    return AutoModelForQuestionAnswering.from_pretrained(folder, local_files_only=True).eval()


def make_mode(folder: Path, names: Sequence[str]) -> QuestionAnswering:
    """The handler's own tokenising and choice of answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    settings = parse_settings({"mode": "question_answering"}, TextSettings, "training")
    return QuestionAnswering(settings, tokenizer, {}, names)


def locate(window: Window, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters [start, end) of the context; (0, 0) where the window lacks them."""
    inside = [
        token
        for token, (own, (left, right)) in enumerate(zip(window.sequence_ids, window.offsets, strict=True))
        if own == 1 and left < end and right > start
    ]
    if not inside or window.offsets[inside[0]][0] > start or window.offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def trained_parameters(model: Any) -> list[nn.Parameter]:
    """The head and the encoder's layers; embeddings are half of all weights and see too few words here to learn."""
    return [*model.qa_outputs.parameters(), *model.base_model.encoder.parameters()]


def train_member(
    model: Any, mode: QuestionAnswering, questions: Sequence[Question], report: Callable[[int], object]
) -> Any:
    """Train one member in place; a long context is several windows, of which those without the answer say so."""
    examples = [(one, window) for one in questions for window in mode.encode(one.item).windows]
    windows = [window for _, window in examples]
    labels = torch.tensor([locate(w, one.start, one.start + len(one.answer)) for one, w in examples])
    lengths = torch.tensor([len(window) for window in windows], dtype=torch.float32)

    def loss_of(rows: Tensor) -> Tensor:
        inputs = pad_windows([windows[row] for row in rows.tolist()], INPUTS, {})
        output = model(**dict(zip(INPUTS, inputs, strict=True)))
        start, end = labels[rows].unbind(1)
        return F.cross_entropy(output.start_logits, start) + F.cross_entropy(output.end_logits, end)

    def batches() -> Sequence[Tensor]:
        # Windows of like length share a batch, which spares padding; jitter and order differ from epoch to epoch.
        near = (lengths + 10 * torch.rand(len(lengths))).argsort().split(BATCH_SIZE)
        return [near[i] for i in torch.randperm(len(near)).tolist()]

    parameters = trained_parameters(model)
    unfreeze(model, parameters)
    fit(parameters, loss_of, batches, len(windows), EPOCHS, LEARNING_RATE, report)
    return model.eval()


@torch.inference_mode()
def answer_questions(
    models: Sequence[Any], mode: QuestionAnswering, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """What the handler would answer: one body per question, each member's own answer in it."""
    bodies = []
    for first in range(0, len(questions), BATCH_SIZE):
        examples = [mode.encode(one.item) for one in questions[first : first + BATCH_SIZE]]
        inputs = pad_windows([window for example in examples for window in example.windows], INPUTS, {})
        outputs = [model(**dict(zip(INPUTS, inputs, strict=True))) for model in models]
        stacked = {key: torch.stack([getattr(o, key) for o in outputs]) for key in ("start_logits", "end_logits")}
        weights = torch.ones(len(models), len(examples))
        for answer in mode.answers(stacked, weights, [Options(detail=True)] * len(examples), examples):
            if isinstance(answer, EnsembleError):
                raise answer
            bodies.append(answer.body)
    return bodies


def score_answers(answers: Sequence[str], questions: Sequence[Question]) -> Score:
    """Compare answers with the right ones as SQuAD does."""
    from torchmetrics.text import SQuAD

    predicted = [{"prediction_text": text, "id": one.id} for text, one in zip(answers, questions, strict=True)]
    right = [{"answers": {"text": [one.answer], "answer_start": [one.start]}, "id": one.id} for one in questions]
    result = SQuAD()(predicted, right)
    return Score(result["exact_match"].item(), result["f1"].item())


def train_members(weights: Path, train: Path, held_out: Path, seeds: range, output_dir: Path) -> list[Score]:
    """Train and write one member per seed, and print how good each and the ensemble are on held-out questions.

    Args:
        weights: Directory of the encoder and its tokenizer.
        train, held_out: Questions in the format of SQuAD.
        seeds: One member each.
        output_dir: Gets a directory seed<seed> per member.

    Returns:
        Scores of each member, then of the ensemble.
    """
    names = [f"seed{seed}" for seed in seeds]
    mode = make_mode(weights, names)
    questions, test = read_questions(train), read_questions(held_out)
    print(f"questions: {len(questions)} to train on, {len(test)} held out")
    models = []
    with tqdm(total=len(seeds) * EPOCHS, unit="epoch", disable=not sys.stderr.isatty()) as bar:
        for seed, name in zip(seeds, names, strict=True):
            models.append(train_member(load_model(weights, seed), mode, questions, bar.update))
            models[-1].save_pretrained(output_dir / name)
            mode.tokenizer.save_pretrained(output_dir / name)
    bodies = answer_questions(models, mode, test)
    own = [[body["members"][i]["answer"] for body in bodies] for i in range(len(models))]
    scores = [score_answers(answers, test) for answers in [*own, [body["prediction"]["answer"] for body in bodies]]]
    for name, score in zip([*names, f"ensemble of {len(models)}"], scores, strict=True):
        print(f"{name}: exact match {score.exact_match:.1f}%, F1 {score.f1:.1f}%")
    return scores


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""

    def train(seeds: range) -> None:
        train_members(find_weights(), options.questions, options.held_out, seeds, options.output_dir)

    return run_training(options, train)
