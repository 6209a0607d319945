"""Turns an archive and examples into pruned members: what `vmap-ensemble prune` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optimise import options as options_of

EPILOG = f"""\
{options_of.DATA}
output:
  OUTPUT/*.safetensors, report.json and .html, pruned.json with the widths of the layers, and setup_config.json, which
  packs them: ./archive.sh NAME --config OUTPUT/setup_config.json

{options_of.RUN}"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble prune",
        description="Cut the same channels, attention heads and neurons from all members, and train what is left.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options_of.add_data(parser, "pruned ensemble")
    add = parser.add_argument
    add("--keep", type=float, default=0.5, metavar="S", help="share of channels, heads and neurons that stays (0.5)")
    add(
        "--unstructured",
        action="store_true",
        help="set the smallest weights to 0 instead; dense hardware gains nothing from it",
    )
    add("--augment", choices=("none", "plain"), default="plain", help="whether half of each batch is changed (plain)")
    options_of.add_training(parser)
    options_of.add_gate(parser)
    options_of.add_machine(parser)
    options = parser.parse_args(arguments)
    options_of.check(parser, options)
    if not 0 < options.keep < 1:
        parser.error(f"--keep: expected a share above 0 and below 1, got {options.keep}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    if not options_of.has("prune", "torchmetrics", "torch_pruning"):
        return 1
    from optimise.prune.run import run  # what follows imports torch

    return options_of.run_tool("prune", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
