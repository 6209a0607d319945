"""Archives of ours and of the looping handler -> what a worker spends on one batch, without a server around it.

    python -m benchmarks.serve.in_process --handler mnist --members 4 --batch 1 4 8

Both archives are loaded by TorchServe's own model loader into this process and asked as a worker asks them, in turns:
from the parsed message to the bytes of the answer. `forward` is the time inside the members' networks; `around` is
reading, decoding, aggregating, answering, metrics and TorchServe's own share. Before any of it both rivals'
probabilities are compared with a plain loop's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import SERVED


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.serve.in_process",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--handler", default="mnist", choices=SERVED, help="what is served")
    add("--members", type=int, default=4, help="size of the ensemble")
    add("--batch", type=int, nargs="+", default=[1, 4, 8], help="requests of a batch")
    add("--threads", type=int, default=None, help="torch threads; the cores at hand by default")
    add("--execution", default="auto", help="how our forward is run")
    add("--rounds", type=int, default=30, help="turns of each rival, of ten calls each")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse_arguments(arguments)
    from benchmarks.runs.in_process import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
