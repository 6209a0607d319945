"""Trained MNIST members -> how well their disagreement tells inputs unlike digits from digits they haven't seen.

    python -m benchmarks.uncertainty --json uncertainty.json            # trains five members; --members DIR: these

Three kinds of unlike inputs are made of what the repository has: the pixels of each digit in random places, squares
of a picture, two digits drawn over one another. Each is told from held-out digits by the mutual information of the
ensemble and, as rivals, by how unsure its probabilities and those of a single member are. A score is judged by the
area under its ROC curve (the chance that an unlike input has the higher score than a digit; 0.5 is guessing) and by
the share of unlike inputs that it finds where one digit in twenty is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import TrainingSettings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.uncertainty",
        description="Tell inputs unlike digits from digits, by disagreement and by confidence.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--members", type=Path, nargs="+", default=[], help="checkpoints, or folders of them; else some are trained")
    add("--num-models", type=int, default=5, help="members to train, at least 2")
    add("--epochs", type=int, default=TrainingSettings().epochs, help="passes over the training images")
    add("--seed", type=int, default=1, help="of the first member, and of the unlike inputs")
    add("--images", type=int, default=None, help="held-out digits to take; without it, all of the sample")
    add("--save-unlike", type=Path, metavar="DIR", default=None, help="also write the unlike inputs as PNG files")
    add("--threads", type=int, default=None, help="of torch; without it, torch decides")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if not options.members and options.num_models < 2:
        parser.error(f"--num-models: one member can't disagree, expected at least 2, got {options.num_models}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train or read, measure and print; 1 where the vmapped forward differs from the loop, 2 for wrong arguments."""
    options = parse_arguments(arguments)
    from benchmarks.runs.uncertainty import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
