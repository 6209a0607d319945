"""Rows of a folder or a table -> rows per second: ours, a plain DataLoader, and one request per row to TorchServe.

python -m benchmarks.offline --json offline.json

digits   PNG files of MNIST's network; the plain DataLoader decodes the same files
texts    5 to 100 tokens each, of MiniLM with a head; the plain DataLoader pads a batch to its longest text
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import OFFLINE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.offline",
        description="Time the rows of predict_many beside a plain DataLoader and beside one request per row.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", nargs="+", default=list(OFFLINE), choices=OFFLINE)
    add("--digits", type=int, default=10_000, metavar="N", help="images")
    add("--texts", type=int, default=5_000, metavar="N", help="texts")
    add("--members", type=int, default=5, metavar="N")
    add("--model_path", type=Path, default=None, help="folder of save_pretrained of texts; MiniLM by default")
    add("--batch_size", type=int, default=64, metavar="N", help="of the plain DataLoader")
    add("--asked", type=int, default=500, metavar="N", help="rows sent to TorchServe, one at a time; 0: none")
    add("--threads", type=int, default=None, help="of torch; without it, torch decides")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    options = parser.parse_args(arguments)
    for name in ("digits", "texts", "members", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if options.asked < 0:
        parser.error(f"--asked: expected 0 or more, got {options.asked}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from benchmarks.runs.offline import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
