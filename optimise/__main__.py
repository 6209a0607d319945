"""Turns `python -m optimise TOOL ...` into the tool of that name: the module of this package that has a `main`."""

from __future__ import annotations

import importlib
import importlib.util
import sys

USAGE = "usage: python -m optimise TOOL [options], such as: python -m optimise distil --help"


def main() -> int:
    """Run the tool that the first argument names; returns its exit code, 2 for wrong usage."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    found = name.isidentifier() and importlib.util.find_spec(f"optimise.{name}") is not None
    run = getattr(importlib.import_module(f"optimise.{name}"), "main", None) if found else None
    if run is None:
        print(USAGE, file=sys.stderr)
        return 2
    return int(run(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
