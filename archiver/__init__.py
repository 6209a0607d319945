"""Turns checkpoints and a block of setup_config.json into one .mar that TorchServe loads."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HANDLERS = REPOSITORY / "handlers"

# handlers/ is the root of every archive, so imports read the same here, in tests and in a worker.
if str(HANDLERS) not in sys.path:
    sys.path.insert(0, str(HANDLERS))
