"""Runs `python -m optimise.quantise ...`."""

import sys

from optimise.quantise.command import main

if __name__ == "__main__":
    sys.exit(main())
