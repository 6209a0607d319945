"""Turns an archive and examples into a student's checkpoints: what `vmap-ensemble distil` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optimise import options as options_of

EPILOG = f"""\
{options_of.DATA}
output:
  OUTPUT/*.safetensors, report.json and .html, and setup_config.json, which packs them: ./archive.sh NAME --config ...

{options_of.RUN}"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble distil",
        description="N members into one network, or into N heads on one trunk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options_of.add_data(parser, "student")
    add = parser.add_argument
    add(
        "--to",
        default="one",
        metavar="one|heads|DIR",
        help="one network (the default), a head per member on one trunk, or the encoder of a directory",
    )
    add("--layers", type=int, metavar="N", help="of one student of texts: the members' encoder with fewer layers")
    add("--architecture", metavar="A", help="of one student, such as torchvision:resnet18; the members' by default")
    add("--head", nargs="+", metavar="MODULE", help="modules that each member keeps; the last layer by default")
    add("--augment", choices=("none", "plain", "diverse"), help="plain for one student, diverse for heads by default")
    options_of.add_training(parser)
    options_of.add_gate(parser)
    options_of.add_machine(parser)
    options = parser.parse_args(arguments)
    options_of.check(parser, options)
    options.directory = None if options.to in ("one", "heads") else Path(options.to)
    if options.directory is not None:
        options.to = "one"
    if options.layers is not None and (options.to == "heads" or options.directory is not None):
        parser.error("--layers: goes with --to one")
    if options.directory is not None and options.architecture:
        parser.error("--architecture: goes with --to one; the directory says the architecture")
    if options.to == "heads" and options.architecture:
        parser.error("--architecture: goes with --to one; heads keep the members' architecture")
    if options.to == "one" and options.head:
        parser.error("--head: goes with --to heads")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    if not options_of.has("distil", "torchmetrics"):
        return 1
    from optimise.distil.run import run  # what follows imports torch

    return options_of.run_tool("distil", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
