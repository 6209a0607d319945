"""Turns an unpacked archive into what tells it from any other: its version and a hash of all that decides answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmap_ensemble.archive.manifest import CODE_SUFFIXES, MEMBERS_FOLDER, hash_file
from vmap_ensemble.archive.modes import CHOICES_FOLDER

DESCRIPTION = "MAR-INF/MANIFEST.json"
# Members and code stand in members.json, native code in compiled.json, graphs in onnx.json, each with its hash. How
# the forward is run fastest on some machine changes no answer.
_ELSEWHERE = (MEMBERS_FOLDER, CHOICES_FOLDER, "MAR-INF", "__pycache__")
_LISTED_SUFFIXES = (*CODE_SUFFIXES, ".pt2", ".onnx", ".onnx.data")


@dataclass(frozen=True)
class Identity:
    """Which archive answers.

    Attributes:
        version: As it was built (`--version`).
        sha256: Of its files' hashes: members, code, settings, labels, tokenizer.
    """

    version: str
    sha256: str


def identify(folder: Path) -> Identity:
    """Read the version and hash the files of an unpacked archive.

    Of members and code it takes the listed hashes. How a server batches, and with how many workers, is left out: the
    model-config yaml, and what was measured of it (choices/).
    """
    told = read_description(folder)
    digest = hashlib.sha256()
    for path in sorted(_files(folder, str(told.get("configFile")))):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return Identity(str(told.get("modelVersion") or ""), digest.hexdigest())


def _files(folder: Path, how: str) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        elsewhere = any(part in _ELSEWHERE for part in name.parts) or name.as_posix() == how
        if not elsewhere and not path.name.endswith(_LISTED_SUFFIXES) and path.is_file():
            yield path


def read_description(folder: Path) -> dict[str, Any]:
    """What TorchServe is told of the model of an unpacked archive; nothing where nobody wrote it."""
    try:
        model = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return model if isinstance(model, dict) else {}
