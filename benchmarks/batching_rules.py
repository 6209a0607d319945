"""Each batching rule of ours -> its time beside vmap's stock rule and the plain loop over members, on one input.

python -m benchmarks.batching_rules --json rules.json

Shapes are those of MiniLM (384 wide, 12 heads). What a model's layers do runs --repeat times in one vmapped call, as
they do it, since entering vmap costs as much as a small product; what a model does once runs once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import TEXTS, refuse_below


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.batching_rules",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num_models", type=int, default=4, help="members")
    add(
        "--batches",
        nargs="+",
        choices=TEXTS,
        default=["ragged", "single"],
        help="texts of a batch",
    )
    add("--repeat", type=int, default=12, help="calls inside one vmapped function")
    add("--threads", type=int, default=2, help="torch threads")
    add("--warmup", type=int, default=5, help="uncounted calls of each rival")
    add("--iterations", type=int, default=40, help="counted calls of each rival")
    add("--block", type=int, default=5, help="calls of one rival in a row")
    add("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    for name in ("num_models", "repeat", "threads", "iterations", "block"):
        refuse_below(parser, options, name, 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where the numbers differ, 2 for a wrong option."""
    options = parse_arguments(arguments)
    from benchmarks.runs.batching_rules import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
