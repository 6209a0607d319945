"""Turns fastertransformer/csrc into libpyt_fastertransformer.so with g++, and stamps it with the torch it fits.

    python -m fastertransformer.build                 # build/libpyt_fastertransformer.so, unless it is current
    python -m fastertransformer.build --output x.so --force

Neither nvcc nor a GPU is needed: CUDA is reached through ATen. The code runs on any x86-64 or ARM machine; the one
kernel that gains from wider registers is compiled per instruction set and chosen at run time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastertransformer import LIBRARY


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Build libpyt_fastertransformer.so for the installed torch."
    )
    parser.add_argument("--output", type=Path, default=LIBRARY, help="file to write (default: in build/)")
    parser.add_argument("--force", action="store_true", help="build even if the file is current")
    parser.add_argument("--sanitize", action="store_true", help="build with AddressSanitizer")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Build from the command line; 1 if it can't be done."""
    options = parse_arguments(arguments)
    from fastertransformer.library import build_asked  # after the arguments: it imports torch

    return build_asked(options)


if __name__ == "__main__":
    sys.exit(main())
