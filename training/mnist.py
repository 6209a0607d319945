"""MNIST and a seed -> members of a deep ensemble: one checkpoint file each, alike in all but the seed.

    python -m training.mnist --save-model --num-models 5 --epochs 3 --seed 1

trains seeds 1 to 5 and writes training/members/mnist/mnist-seed1.pt and so on. A member's seed decides its
first weights, the order of its images and its dropout; the number of threads can change the last digits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import MEMBERS, TrainingSettings, positive


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m training.mnist",
        description="Train MNIST members that differ in their seed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--save-model", action="store_true", help="write one checkpoint a member; else only report")
    add("--num-models", type=positive(int), default=5, help="members to train")
    add("--epochs", type=positive(int), default=defaults.epochs, help="passes over the training images")
    add("--seed", type=int, default=1, help="seed of the first member; the next ones count up")
    add(
        "--data-dir", type=Path,
        help="folder with MNIST's four idx files, or the word sample for the repository's own 6000 images; "
        "without it: what --download fetched earlier, or else the sample",
    )  # fmt: skip
    add("--download", action="store_true", help="fetch the full set through torchvision first")
    add("--output-dir", type=Path, default=MEMBERS / "mnist", help="where the checkpoints go")
    add("--batch-size", type=positive(int), default=defaults.batch_size, help="images per step")
    add(
        "--lr",
        type=positive(float),
        default=defaults.learning_rate,
        help="highest learning rate of the cycle",
    )
    add("--threads", type=positive(int), default=None, help="threads of torch; without it, torch decides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from training.runs.mnist import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
