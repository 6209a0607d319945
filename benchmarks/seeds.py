"""The published setting of vmapped ensembles on a GPU of 2022 -> the same ratios on this machine, beside them.

    python -m benchmarks.seeds --json seeds.json

Two members, one input: MNIST on 28x28 pixels, ResNet-18 on 720x720, a BERT-base on 10 tokens. The published figures
are ratios of a loop, its host's part included, to stock vmap. They are of other hardware and other software, so they
are no rivals of the figures here; they say what the setting was and what was found in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import SEEDS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.seeds", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SEEDS, default=list(SEEDS), help="which")
    parser.add_argument("--threads", type=int, default=None, help="of torch; without it, torch decides")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure each")
    parser.add_argument("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where numbers differ from the loop's."""
    options = parse_arguments(arguments)
    from benchmarks.runs.seeds import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
