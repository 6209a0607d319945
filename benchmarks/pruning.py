"""MNIST's digits in colour, ResNet-18 members trained on them, half of their channels cut -> what is lost and gained.

    python -m benchmarks.pruning --output runs/pruning

Each digit is drawn in a colour of its own on a ground of another, so that a network must look at shapes. Training,
archive and pruning are commands that anybody runs; the figures are those of `vmap-ensemble prune`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vmap_ensemble.process.outcome import exit_code


def main(arguments: list[str] | None = None) -> int:
    """Train, pack, prune and print the table."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.pruning",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of everything")
    parser.add_argument("--members", type=int, default=2, metavar="N", help="members")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="of a member, and of fine-tuning")
    parser.add_argument("--keep", type=float, default=0.5, metavar="S", help="share of the channels that stays")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    options = parser.parse_args(arguments)
    from benchmarks.runs.pruning import run  # after the arguments: it imports torch

    return exit_code("pruning", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
