"""Turns an archive of N members into figures of its loading: seconds per phase, and peak memory against the bound.

    python -m benchmarks.loading --architecture resnet18 --members 8 --json loading.json
    python -m benchmarks.loading --architecture resnet50 --members 8 --served      # a real TorchServe, too
    git worktree add --detach /tmp/first 99c1346                                   # and another version beside it
    python -m benchmarks.loading --architecture resnet50 --members 8 --served --against /tmp/first/handlers

The bound: peak resident memory while loading is at most the stack plus one member plus the interpreter with its
imports, as exactly as Linux counts it. Members differ in every weight; a fresh process loads them with the code that
a worker runs. The first start has to measure how to run the forward, the later ones find that choice: both are shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="resnet18", help="torchvision's name of it (default: %(default)s)")
    parser.add_argument("--members", type=int, default=8, help="number of members (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="batchSize of the worker (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="starts with a kept choice (default: %(default)s)")
    parser.add_argument("--served", action="store_true", help="start real TorchServes as well")
    parser.add_argument("--against", type=Path, metavar="HANDLERS", help="with --served: another version's handlers/")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print and write the figures; exit 1 when the peak exceeds the bound."""
    options = parse_arguments(arguments)
    from benchmarks.runs.loading import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
