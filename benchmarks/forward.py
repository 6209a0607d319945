"""Networks, members and batches -> the times of every way to run the ensemble on this machine, side by side.

    python -m benchmarks.forward --model resnet18 --members 4 --batch 1 8 --json forward.json

Every row has the largest difference to the plain loop, relative to the loop's largest output, and its distance to
the roofline: the least time that the arithmetic and the weights need at ceilings measured in the same run. A rival
that isn't installed, or fails, is a row with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import DTYPES, NETWORKS, RIVALS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.forward",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=NETWORKS, default=["resnet18"], help="networks")
    add("--members", type=int, nargs="+", default=[4], help="sizes of the ensemble, such as 2 4 8 16 32")
    add("--batch", type=int, nargs="+", default=[1], help="batch sizes, such as 1 8 32")
    add("--device", default="cpu", help="where to run, such as cuda")
    add("--dtype", default="fp32", choices=DTYPES, help="of members and inputs")
    add("--threads", type=int, default=None, help="of torch and of the other runtimes; without it, torch decides")
    add("--seconds", type=float, default=30.0, help="about how long to measure each cell")
    add("--only", nargs="+", choices=RIVALS, default=list(RIVALS), help="rivals beside the loop")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; 1 where a rival's numbers differ from the loop's."""
    options = parse_arguments(arguments)
    from benchmarks.runs.forward import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
