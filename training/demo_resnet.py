"""Turns nothing but a seed, or torchvision's weights where the network allows, into ResNet-18 members to try.

`python -m training.demo_resnet` writes training/members/resnet/<name>.pth. torchvision has one set of ResNet-18
weights, so the other members are that one with a seeded perturbation: they disagree a little, as a deep ensemble
does, but are no substitute for members trained from different seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.options import MEMBERS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m training.demo_resnet", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--num-models", type=int, default=3, help="members (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first member (%(default)s)")
    parser.add_argument("--random", action="store_true", help="random weights, without asking the network")
    parser.add_argument("--output-dir", type=Path, default=MEMBERS / "resnet")
    options = parser.parse_args(arguments)
    if options.num_models < 1:
        parser.error(f"--num-models: expected at least 1, got {options.num_models}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write one file per member."""
    options = parse_arguments(arguments)
    from training.runs.demo_resnet import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
