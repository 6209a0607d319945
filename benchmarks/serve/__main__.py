"""N checkpoints -> requests per second, latencies and memory of a real TorchServe, in each way to serve them.

    python -m benchmarks.serve --members 4 --handlers resnet18 --json serve.json

One rival after another, each in a TorchServe of its own with the same configuration, the same pictures and the same
batchSize and maxBatchDelay; torch threads together are the cores. First a closed loop of some clients, then an open
one at the same rate for all. Before any load, every rival's probabilities are compared with a plain loop's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import OPEN_SHARE, SERVED, SERVED_RIVALS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.serve", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--members", type=int, nargs="+", default=[4], help="sizes of the ensemble")
    add("--handlers", nargs="+", default=["resnet18"], choices=SERVED, help="what is served")
    add(
        "--rivals",
        nargs="+",
        default=list(SERVED_RIVALS[:4]),
        choices=SERVED_RIVALS,
        help="ways to serve it",
    )
    add("--clients", type=int, nargs="+", default=[8], help="clients of the closed loops; 0 for none")
    add("--rate", type=float, default=None, help="requests a second of the open loop; 0 for none; default: "
        f"{OPEN_SHARE} of what `separate` reached in its first closed loop")  # fmt: skip
    add("--batch_size", type=int, default=8, help="TorchServe's batchSize, for every model")
    add("--delay_ms", type=int, default=5, help="TorchServe's maxBatchDelay, for every model")
    add("--seconds", type=float, default=5.0, help="length of a round")
    add("--rounds", type=int, default=3, help="counted rounds of each load")
    add("--warmup", type=float, default=2.0, help="seconds of load that aren't counted")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a rival's probabilities differ from the loop's."""
    options = parse_arguments(arguments)
    from benchmarks.runs.serve import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
