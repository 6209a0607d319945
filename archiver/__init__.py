"""Turns checkpoints and a block of setup_config.json into one .mar that TorchServe loads."""

from __future__ import annotations

import os
from pathlib import Path

import vmap_ensemble

# Handler files lie beside the package, in a repository as where it is installed.
HANDLERS = Path(vmap_ensemble.__file__).resolve().parent.parent
# Of the tools: a repository's root, or the folder that they are installed into.
ROOT = Path(__file__).resolve().parent.parent
# Where blocks and archives lie by default: for a repository's ./archive.sh its own, else where the caller is.
HOME = Path(os.environ.get("VMAP_ENSEMBLE_HOME") or Path.cwd())
