"""Turns the environment into the folder of what workers keep between starts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; a path that nothing can be written to where the user has no home.

    Whoever writes there goes on without it: a shared folder such as /tmp would let others put libraries into it.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says its specification.
    if not os.path.isabs(given):
        try:
            given = str(Path.home() / ".cache")
        except RuntimeError:  # neither $HOME nor an entry in the list of users
            given = os.devnull
    return Path(given) / "vmap-ensemble"


# What workers keep between starts.
CACHE = cache_folder()
