"""Real MiniLM weights and questions with their answers -> members that answer questions, a directory each.

    python -m training.question_answering --num-models 2

writes training/members/question_answering/seed1 and so on, as save_pretrained does. Members differ in their seed,
which decides the head's first weights, the order of the questions and the dropout. Questions come in the format of
SQuAD 1.1, so that --questions and --held-out may name files of SQuAD itself. What is printed of the held-out
questions is computed as the handler does (handlers/vmap_ensemble/question_answering.py) and scored by torchmetrics.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import HELD_OUT_FILE, MEMBERS, QUESTIONS_FILE, positive


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m training.question_answering",
        description="Fine-tune members that answer questions from MiniLM's weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-models", type=positive(int), default=2, help="members to train")
    add("--seed", type=int, default=1, help="seed of the first member; the next ones count up")
    add("--output-dir", type=Path, default=MEMBERS / "question_answering", help="gets one directory per member")
    add("--questions", type=Path, default=QUESTIONS_FILE, help="to train on, in the format of SQuAD 1.1")
    add(
        "--held-out",
        type=Path,
        default=HELD_OUT_FILE,
        help="to score the members on, in the same format",
    )
    add("--threads", type=positive(int), default=None, help="threads of torch; without it, torch decides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from training.runs.question_answering import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
