"""Turns an archive and examples into a student's checkpoints: what `vmap-ensemble distil` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vmap_ensemble.process.outcome import exit_code

EPILOG = """\
data:
  a folder of images in folders named by their label, or without; a .csv, .tsv, .jsonl or .parquet table with paths
  and a column 'label'; a folder with MNIST's idx files

output:
  OUTPUT/*.safetensors, report.json, and setup_config.json, which packs them: ./archive.sh NAME --config OUTPUT/...

A run that is cut off goes on where it was when the same command is given again.

exit codes: 0 done, 1 refused or beyond the gate, 2 wrong usage, 130 stopped
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble distil",
        description="N members into one network, or into N heads on one trunk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("--data", type=Path, required=True, metavar="DATA", help="what the student learns from")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the student")
    add("--to", choices=("one", "heads"), default="one", help="one network, or a head per member on one trunk")
    add("--test", type=Path, metavar="DATA", help="what it is judged by; else a part of --data is held out")
    add("--unlike", type=Path, metavar="DATA", help="inputs of another kind, which the uncertainty is to tell")
    add("--column", metavar="NAME", help="column of a table that holds paths of images")
    add("--label-column", metavar="NAME", help="column of a table that holds labels; 'label' by default")
    add("--unlabelled", action="store_true", help="look for no labels; folders are no labels")
    add("--architecture", metavar="A", help="of one student, such as torchvision:resnet18; the members' by default")
    add("--head", nargs="+", metavar="MODULE", help="modules that each member keeps; the last layer by default")
    add("--augment", choices=("none", "plain", "diverse"), help="plain for one student, diverse for heads by default")
    add("--epochs", type=int, default=20, metavar="N", help="passes over the examples, at most (20)")
    add(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="epochs without a lower held-out loss until it stops (5)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="examples in a step (64)")
    add("--lr", type=float, default=1e-3, metavar="R", help="the highest learning rate (0.001)")
    add("--weight-decay", type=float, default=1e-2, metavar="W", help="of AdamW (0.01)")
    add("--temperature", type=float, default=2.0, metavar="T", help="of the soft targets (2)")
    add(
        "--label-weight",
        type=float,
        metavar="W",
        help="share of labels in the loss; 0.1 for one, 0 for heads",
    )
    add("--held-out", type=float, default=0.1, metavar="S", help="share of --data that decides when to stop (0.1)")
    add("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (0)")
    add("--max-accuracy-loss", type=float, default=0.01, metavar="S", help="accuracy that may be lost (0.01)")
    add("--max-nll-loss", type=float, default=0.05, metavar="N", help="negative log-likelihood, in nats (0.05)")
    add("--force", action="store_true", help="write setup_config.json even if more is lost")
    add("--anew", action="store_true", help="begin again, whatever is in the output folder")
    add("--workers", type=int, default=0, metavar="N", help="processes that read and decode images (0)")
    add("--threads", type=int, metavar="N", help="torch's threads; torch's own choice by default")
    add("--device", metavar="DEVICE", help="cpu, cuda:0 ...; the archive's by default")
    add("--execution", metavar="MODE", help="how ensemble and student are run; the archive's by default")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, least in (("epochs", 1), ("patience", 1), ("batch_size", 2), ("threads", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected {least} or more, got {value}")
    for name in ("lr", "temperature"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: expected a number above 0, got {getattr(options, name)}")
    if options.label_weight is not None and not 0 <= options.label_weight <= 1:
        parser.error(f"--label-weight: expected a share from 0 to 1, got {options.label_weight}")
    if not 0 < options.held_out <= 0.4:
        parser.error(f"--held-out: expected a share above 0, at most 0.4, got {options.held_out}")
    if options.to == "heads" and options.architecture:
        parser.error("--architecture: goes with --to one; heads keep the members' architecture")
    if options.to == "one" and options.head:
        parser.error("--head: goes with --to heads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    try:
        import torchmetrics  # noqa: F401 (before minutes of work)
    except ImportError:
        print("distil: scores need torchmetrics; pip install 'vmap-ensemble[distil]'", file=sys.stderr)
        return 1
    from optimise.distil.run import run  # what follows imports torch

    return exit_code("distil", lambda: run(options), "stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
