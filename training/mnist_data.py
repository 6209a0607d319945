"""The full MNIST set -> the repository's sample of it.

    python -m training.mnist_data --make-sample FULL_SET data

takes every tenth training image and every fifth test image of the full set, in order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m training.mnist_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--make-sample", nargs=2, type=Path, metavar=("FULL_SET", "TARGET"), required=True,
        help="cut the sample out of the full set in the first folder and write it below the second",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from training.runs.mnist_data import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
