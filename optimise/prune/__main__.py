"""Runs `python -m optimise.prune ...`."""

import sys

from optimise.prune.command import main

if __name__ == "__main__":
    sys.exit(main())
