"""Turns setup_config.json into blocks, archive name -> what it says, unchecked; imports nothing that takes time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from archiver.blocks.flat import DEFAULT_NAME, is_flat, read_flat
from vmap_ensemble.errors import ArchiveError


def read_blocks(path: Path, name: str | None = None) -> dict[str, dict[str, Any]]:
    """Read setup_config.json: archive name -> block.

    Args:
        path: The file; a flat one, as TorchServe's Hugging Face example has it, is a single block.
        name: What the archive of a flat file is called; by default what the file says, or `ens`.

    Raises:
        ArchiveError: It is missing, not JSON, or neither an object of objects nor a flat block.
    """
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArchiveError(f"{path}: no such file; --config names another") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{path.name}: expected JSON ({error})") from None
    if not isinstance(blocks, dict):
        raise ArchiveError(f"{path.name}: expected an object, archive name -> block")
    blocks.pop("$schema", None)  # for editors
    if is_flat(blocks):
        block = read_flat(blocks, path.absolute().parent, path.name)
        return {name or str(blocks.get("name", DEFAULT_NAME)): block}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise ArchiveError(f"{path.name}: block '{name}': expected an object, got {type(block).__name__}")
    return blocks
