"""Photos -> time and exactness of decoding JPEG files at 1/2, 1/4 or 1/8 of their size, against decoding them whole.

    python -m benchmarks.scaled_decoding photo.jpg --enlarge 2 4

Each photo, and larger versions of it, is turned into the input of torchvision's ImageNet transform: decoded whole,
and scaled to at least 1, 2 and 4 times the side that the transform resizes to. Differences are of the input, in steps
of the 256 that a pixel has, and of the mean probabilities of ResNet-18 members, random unless given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import SAMPLE_IMAGE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.scaled_decoding",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("photos", type=Path, nargs="*", default=[SAMPLE_IMAGE], help="image files")
    add(
        "--enlarge",
        type=float,
        nargs="*",
        default=[2, 4],
        help="factors of larger versions, besides the photo as it is",
    )
    add("--quality", type=int, default=90, help="JPEG quality of the larger versions")
    add("--checkpoints", type=Path, nargs="*", default=[], help="state dicts of ResNet-18 members; random by default")
    add("--members", type=int, default=4, help="random members, where no checkpoints are given")
    add("--calls", type=int, default=40, help="timed calls of each way")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse_arguments(arguments)
    from benchmarks.runs.scaled_decoding import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
