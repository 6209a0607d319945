"""A GPU -> correctness of every handler, mode and dtype, then times of all rivals: one file named after the chip.

    python -m benchmarks.gpu --json benchmarks/results            # under four minutes; --quick: one minute

Needs torch, torchvision, transformers, tqdm, psutil, Pillow and numpy, but no TorchServe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Check, measure and write; 0 if all is right, 1 if something isn't, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.gpu", description="Check and measure a GPU."
    )
    parser.add_argument("--json", type=Path, metavar="DIR", default=None, help="write gpu-CHIP.json into this folder")
    parser.add_argument("--quick", action="store_true", help="fp16 alone and some settings, in a minute")
    options = parser.parse_args(arguments)
    from benchmarks.runs.gpu import start  # after the arguments: it imports torch

    return start(options.json, options.quick)


if __name__ == "__main__":
    sys.exit(main())
