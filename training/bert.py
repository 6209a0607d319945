"""Real MiniLM weights and a labelled text set -> members of an ensemble of fine-tunes, a directory each.

    python -m training.bert --num-models 3

writes training/members/bert/seed1 and so on, as save_pretrained does: config.json, model.safetensors and the
tokenizer, which is what ./archive.sh packs. Members differ in their seed, which decides the head's first weights,
the order of the texts and the dropout. What --train doesn't name is the same in all members, so it is stored once:

    head    pooler and classifier, on features of the whole encoder that are computed once; seconds
    last    the encoder's last layer as well (the default); the rest stays frozen
    all     every weight
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import MEMBERS, TEXTS_FILE, positive

# Keys of EPOCHS in runs/bert.py.
TRAIN = ("all", "head", "last")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m training.bert",
        description="Fine-tune members of a text ensemble from MiniLM's weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-models", type=positive(int), default=3, help="members to train")
    add("--seed", type=int, default=1, help="seed of the first member; the next ones count up")
    add(
        "--train",
        choices=TRAIN,
        default="last",
        help="what learns; the rest is shared by all members",
    )
    add("--output-dir", type=Path, default=MEMBERS / "bert", help="gets one directory per member")
    add("--texts", type=Path, default=TEXTS_FILE, help="tab-separated: split (train, held_out), label, text")
    add("--threads", type=positive(int), default=None, help="threads of torch; without it, torch decides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from training.runs.bert import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
