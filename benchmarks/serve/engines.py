"""N checkpoints -> requests per second of TorchServe and Ray Serve, with one archive and with the members in a loop.

    python -m benchmarks.serve.engines --handler mnist --members 4 --clients 8 --json engines.json

All servers run at the same time and are asked in turns, a round each, so that what else the machine does meets all of
them; one that isn't asked waits. Every one has as many torch threads, and is sent the same pictures. Before any load
the probabilities of each are compared with a plain loop's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import ENGINES, SERVED


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.serve.engines",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--handler", default="mnist", choices=SERVED, help="what is served")
    add("--members", type=int, default=4, help="size of the ensemble")
    add("--rivals", nargs="+", default=list(ENGINES), choices=ENGINES, help="ways to serve it")
    add("--clients", type=int, default=8, help="clients of the closed loop")
    add("--threads", type=int, default=1, help="torch threads of each")
    add("--batch_size", type=int, default=8, help="requests in a batch, where there are batches")
    add(
        "--delay_ms",
        type=int,
        default=2,
        help="milliseconds that a request waits for others, where there are batches",
    )
    add("--seconds", type=float, default=3.0, help="length of a round")
    add("--rounds", type=int, default=5, help="counted rounds of each")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a rival's probabilities differ from the loop's."""
    options = parse_arguments(arguments)
    from benchmarks.runs.engines import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
