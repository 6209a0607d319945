"""Turns `python -m optimise TOOL ...` into the tool of that name: the module of this package that has a `main`."""

from __future__ import annotations

import importlib
import importlib.util
import sys

USAGE = "usage: python -m optimise TOOL [options], such as: python -m optimise distil --help"

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    if not name.isidentifier() or importlib.util.find_spec(f"optimise.{name}") is None:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    sys.exit(importlib.import_module(f"optimise.{name}").main(sys.argv[2:]))
