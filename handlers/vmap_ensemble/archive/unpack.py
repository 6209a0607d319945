"""Turns a .mar file into a folder with its contents, removed when nobody holds it any more."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.errors import LoadError

# TorchServe's own file in an archive; members.json is ours.
MAR_FILE = "MAR-INF/MANIFEST.json"


@contextmanager
def unpacked(path: str | Path) -> Iterator[Path]:
    """The folder of an archive: itself where it is unpacked already, else a temporary one.

    Args:
        path: A .mar, or the folder that it was unpacked into.

    Raises:
        LoadError: There is no such file or folder, or it is no whole archive of ours.
    """
    path = Path(path)
    if path.is_dir():
        yield checked(path)
        return
    if not path.is_file():
        raise LoadError(
            f"{path.name}: no such archive; expected a .mar file, or the folder that one was unpacked into"
        )
    with tempfile.TemporaryDirectory(prefix="vmap-ensemble-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                # Extraction checks the CRC of every file as it reads it, and drops `..` from names.
                archive.extractall(folder)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise LoadError(f"{path.name}: not a whole archive ({error})") from None
        yield checked(folder, path.name)


def checked(folder: Path, shown: str | None = None) -> Path:
    """The folder, if it holds an archive of ours.

    Raises:
        LoadError: It doesn't.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise LoadError(f"{shown or folder.name}: holds no {SETTINGS_FILE}; expected an archive of ./archive.sh")
    return folder


def read_version(folder: Path) -> str:
    """The version that an archive was built with; empty where its folder doesn't say one."""
    try:
        model = json.loads((folder / MAR_FILE).read_text(encoding="utf-8"))["model"]
        return str(model.get("modelVersion") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
