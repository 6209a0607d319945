"""MNIST members -> how long they take one after another, and as one vmapped ensemble.

python -m benchmarks.mnist_vmap --image_path data/digits/3.png --num_models 5
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.options import SAMPLE_DIGIT, comparison_parser, parse_comparison


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = comparison_parser("MnistNet", SAMPLE_DIGIT, "python -m benchmarks.mnist_vmap")
    return parse_comparison(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from benchmarks.runs.mnist_vmap import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
