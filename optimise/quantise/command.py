"""Turns an archive of encoders and sample texts into one in 8 bits: what `vmap-ensemble quantise` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optimise import options as options_of

EPILOG = f"""\
samples:
  a folder of .txt files in folders named by their label, or without; a .csv, .tsv, .jsonl or .parquet table with
  texts and a column 'label'. Without labels the ensemble's own answers stand in for them. Nothing is calibrated.

output:
  OUTPUT.mar, and beside it a folder OUTPUT with report.json and .html, the members, and the setup_config.json that
  packed them

Images are calibrated when they are packed: ./archive.sh NAME --samples IMAGES --set quantization=int8

{options_of.RUN}"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble quantise",
        description="Serve the layers of encoders in 8 bits, on a CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("--samples", type=Path, required=True, metavar="DATA", dest="data", help="what it is judged by")
    add("--output", type=Path, required=True, metavar="MAR", help="the new archive; the report lies beside it")
    options_of.add_reading(parser)
    options_of.add_gate(parser)
    options_of.add_machine(parser)
    options = parser.parse_args(arguments)
    options_of.check(parser, options)
    if options.output.suffix != ".mar":
        parser.error(f"--output: expected a name that ends in .mar, got {options.output}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    if not options_of.has("quantise", "torchmetrics"):
        return 1
    from optimise.quantise.run import run  # what follows imports torch

    return options_of.run_tool("quantise", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
