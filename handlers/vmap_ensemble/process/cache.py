"""Turns the environment into the folder of what workers keep between starts."""

from __future__ import annotations

import os
from pathlib import Path

# What workers keep between starts.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmap-ensemble"
