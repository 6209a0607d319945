"""Turns what a command raises into one line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vmap_ensemble.errors import EnsembleError


def exit_code(name: str, run: Callable[[], int], stopped: str = "stopped") -> int:
    """Run a command: its own exit code, 1 for what is refused, 130 where somebody stopped it.

    Args:
        name: Begins the line.
        run: The command.
        stopped: What is said of Ctrl-C.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except EnsembleError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{name}: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
