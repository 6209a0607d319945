"""Runs `python -m optimise.distil ...`."""

import sys

from optimise.distil.command import main

if __name__ == "__main__":
    sys.exit(main())
