"""What the commands that train share of their options, and where they read and write; without importing torch.

A command reads its arguments first and imports its work from `training.runs` afterwards, so that `--help` and wrong
usage are answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MEMBERS = REPOSITORY / "training" / "members"
TEXTS_FILE = REPOSITORY / "training" / "data" / "intents.tsv"
# Of a text set: what learns, and what judges.
SPLITS = ("train", "held_out")
QUESTIONS_FILE = REPOSITORY / "training" / "data" / "questions.json"
HELD_OUT_FILE = REPOSITORY / "training" / "data" / "questions_held_out.json"


@dataclass(frozen=True)
class TrainingSettings:
    """How one member is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: the highest of the one cycle that the rate goes through.
        weight_decay: of AdamW.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Make an argparse type that refuses zero and below."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse
