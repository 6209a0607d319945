"""Turns what was made into checkpoints, and a block that packs them with the archive's handler and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from archiver.packing.pack import RESERVED_NAMES
from vmap_ensemble.archive.identity import read_description
from vmap_ensemble.archive.labels import LABELS_FILE
from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.models.pruned import PRUNED_SUFFIX
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER
from vmap_ensemble.process.files import written_whole

# What ./archive.sh makes of its own belongs to the archive's members; labels, config and tokenizer go over.
MADE = {*RESERVED_NAMES, "__pycache__"} - {LABELS_FILE, PRETRAINED_FOLDER}


def write_members(folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """One .safetensors a member, each whole or not there; the names of the files.

    Args:
        folder: Where they go.
        states: Name of the member -> its state dict.
    """
    files = []
    for name, state in states.items():
        # A clone apart: safetensors refuses tensors that share memory, as tied ones do.
        own = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
        with written_whole(folder / f"{name}.safetensors") as scratch:
            save_file(own, scratch)
        files.append(f"{name}.safetensors")
    return files


def write_block(
    folder: Path, archive: Path, name: str, settings: Mapping[str, Any], members: list[str], new: Path | None = None
) -> Path:
    """setup_config.json, with what it names copied beside it from the archive, or from what is new.

    Args:
        folder: Where members lie, and everything goes.
        archive: The unpacked archive that the tool was given.
        name: Of the new archive.
        settings: Of the new archive.
        members: Files in `folder`.
        new: A folder with files of the new archive that are others than the old one's: pretrained/, pruned.json.
    """
    block = {key: value for key, value in settings.items() if key != "name"} | {"members": members}
    model_file = str(settings.get("architecture", "")).partition(":")[0]
    roles = {
        str(settings["handler"]): "handler",
        LABELS_FILE: "labels",
        PRETRAINED_FOLDER: "pretrained",
        str(read_description(archive).get("configFile", "")): "model_config",
        model_file if model_file.endswith((".py", PRUNED_SUFFIX)) else "": "model_file",
    }
    extra = []
    for path in _files_of(archive, new):
        _copy(path, folder / path.name)
        if path.name in roles:
            block[roles[path.name]] = path.name
        else:
            extra.append(path.name)
    if extra:
        block["extra_files"] = extra
    return write_json(folder / SETTINGS_FILE, {name: block})


def stage_files(archive: Path, folder: Path) -> None:
    """The files of an archive that aren't its members', in a folder of their own."""
    folder.mkdir()
    for path in _files_of(archive, None):
        _copy(path, folder / path.name)


def _files_of(archive: Path, new: Path | None) -> list[Path]:
    found = {path.name: path for path in archive.iterdir() if path.name not in MADE}
    if new is not None and new != archive:
        found.update({path.name: path for path in new.iterdir()})
    return [found[name] for name in sorted(found)]


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, to)


def write_json(path: Path, value: Any) -> Path:
    """A JSON file that is whole or not there."""
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
