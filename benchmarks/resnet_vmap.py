"""Members of a torchvision architecture -> their time one after another, and as one vmapped ensemble.

python -m benchmarks.resnet_vmap --image_path data/images/sample.jpg --num_models 3 --model_path resnet18.pth
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.options import SAMPLE_IMAGE, comparison_parser, parse_comparison


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = comparison_parser("ResNet", SAMPLE_IMAGE, "python -m benchmarks.resnet_vmap")
    parser.add_argument("--architecture", default="resnet18", help="name of a torchvision classifier")
    return parse_comparison(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from benchmarks.runs.resnet_vmap import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
