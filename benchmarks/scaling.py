"""A network and growing numbers of members -> time and memory of the one forward, and what a member adds.

    python -m benchmarks.scaling --model mnist resnet18 minilm --json scaling.json

Times: all sizes in one process and in turns, each as mode `auto` chose to run it, beside the plain loop. Memory: a
fresh process per size, which holds the stack and runs forwards. The slopes are least-squares fits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import NETWORKS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.scaling",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=NETWORKS, default=["mnist", "resnet18", "minilm"], help="networks")
    add("--members", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes of the ensemble, two or more")
    add("--batch", type=int, default=1, help="examples in a batch")
    add("--threads", type=int, default=None, help="of torch; without it, torch decides")
    add("--seconds", type=float, default=30.0, help="about how long to time each network")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    add("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if len(set(options.members)) < 2 or min(options.members) < 1:
        parser.error(f"--members: expected two or more different sizes of 1 or more, got {options.members}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where numbers differ from the loop's."""
    options = parse_arguments(arguments)
    from benchmarks.runs.scaling import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
