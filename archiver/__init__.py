"""Turns checkpoints and a block of setup_config.json into one .mar that TorchServe loads."""

from __future__ import annotations

from pathlib import Path

import vmap_ensemble

# Handler files lie beside the package, in a repository as where it is installed.
HANDLERS = Path(vmap_ensemble.__file__).resolve().parent.parent
# Of the tools: a repository's root, or the folder that they are installed into.
ROOT = Path(__file__).resolve().parent.parent
# Where blocks and archives lie by default: in a repository its own, elsewhere where the caller is.
HOME = ROOT if (ROOT / "setup_config.json").is_file() else Path.cwd()
