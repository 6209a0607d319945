"""Trained MNIST members and the test images -> a table: accuracy and calibration of each and of the ensemble.

python -m training.evaluate --members training/members/mnist
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import MEMBERS, positive


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m training.evaluate", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--members", type=Path, nargs="+", default=[MEMBERS / "mnist"], help="checkpoints, or folders of them")
    add("--data-dir", type=Path, help="folder with MNIST's files, or the word sample; as in training.mnist")
    add("--download", action="store_true", help="fetch the full set through torchvision first")
    add("--threads", type=positive(int), help="threads of torch")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from training.runs.evaluate import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
