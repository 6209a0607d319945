"""Turns what a user calls a member (a file, a Hugging Face directory, a folder of either, a glob, a name of
torchvision's weights) into named checkpoint files.
"""

from __future__ import annotations

import difflib
import glob
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

from archiver.blocks.request import nothing_there
from archiver.source import Source
from archiver.texts.adapters import merge_adapter
from archiver.texts.pretrained import find_directory, find_weights, is_lone_adapter
from vmap_ensemble.archive.checkpoints import SUFFIXES, checkpoint_stem, looks_like_checkpoint
from vmap_ensemble.errors import ArchiveError, NetworkError
from vmap_ensemble.process.order import natural

TORCHVISION = "torchvision:"
NAME = re.compile(r"[A-Za-z0-9._-]+")
# members/shared.safetensors is what all members share.
RESERVED = "shared"
# File systems take names of 255 bytes; a member's file has a suffix, and a name that isn't the only one a number.
LONGEST_NAME = 200
# Weights of other frameworks, which would be left out of a folder in silence.
FOREIGN_SUFFIXES = (
    ".h5",
    ".hdf5",
    ".keras",
    ".onnx",
    ".msgpack",
    ".npz",
    ".gguf",
    ".pb",
    ".tflite",
    ".pt2",
    ".pickle",
)


# How transformers calls one of several files of weights.
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class _Found:
    """What a spec stands for: the file, what names come from, how it is shown, the Hugging Face directory."""

    path: Path
    naming: Path
    shown: str
    folder: Path | None = None
    weights: str | None = None


def resolve_members(specs: Sequence[str] | dict[str, str], folder: Path, scratch: Path | None = None) -> list[Source]:
    """Find the checkpoint of every member and give each a name.

    Args:
        specs: Files, directories of save_pretrained, folders (every checkpoint or every such directory
            directly inside), globs, or `torchvision:ResNet50_Weights.IMAGENET1K_V1`; or name -> one of these
            that stands for one member.
        folder: Where relative paths start.
        scratch: Where adapters are merged; without it, and without peft, they are refused.

    Returns:
        Members in the order given; those of a folder or a glob in natural order (m2 before m10).

    Raises:
        ArchiveError: Nothing is given or found, a file is given twice, or a name isn't allowed.
        NetworkError: Weights of torchvision aren't cached and can't be fetched.
    """
    try:
        return _resolve(specs, folder, scratch)
    except (OSError, ValueError) as error:  # names that no file system takes, folders that may not be read
        raise ArchiveError(f"members: can't be looked for ({error})") from None


def _resolve(specs: Sequence[str] | dict[str, str], folder: Path, scratch: Path | None) -> list[Source]:
    if isinstance(specs, dict) and specs:
        return [_source(*_named(name, spec, folder), scratch) for name, spec in specs.items()]
    found = [item for spec in specs for item in _expand(spec, folder)]
    if not found:
        raise ArchiveError("no members: expected at least one checkpoint; give --members or the key 'members'")
    counts = Counter(item.path.resolve() for item in found)
    twice = [item for item in found if counts[item.path.resolve()] > 1]
    if twice:
        raise ArchiveError(f"member '{twice[0].naming.name}' is given twice; name both to keep them: {{name: path}}")
    names = unique_names([item.naming for item in found])
    return [_source(name, item, scratch) for name, item in zip(names, found, strict=True)]


def _source(name: str, item: _Found, scratch: Path | None) -> Source:
    if item.folder is not None and is_lone_adapter(item.folder):
        merged = merge_adapter(item.folder, scratch / f"merged-{name}" if scratch else None)
        return Source(name, find_weights(merged) or item.path, item.shown, merged)
    return Source(name, item.path, item.shown, item.folder, item.weights)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name per path: the stem, or the shortest end of the path that tells members of one stem apart.

    fold0/model.pt and fold1/model.pt become fold0-model and fold1-model. Characters outside
    [A-Za-z0-9._-] become '_'; what is still equal gets a number.
    """
    depths = [1] * len(paths)
    names = [_name_at(path, 1) for path in paths]
    for _ in range(max((len(path.parts) for path in paths), default=0)):
        counts = Counter(names)
        clashes = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(paths[i].parts)]
        if not clashes:
            break
        for i in clashes:
            depths[i] += 1
            names[i] = _name_at(paths[i], depths[i])
    return _number_equal_ones(_shorten(paths, names))


def _shorten(paths: Sequence[Path], names: list[str]) -> list[str]:
    """Equal to the root: the suffix tells model.pt from model.pth in one folder."""
    counts = Counter(names)
    return [_clean(path.name) if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)]


def _number_equal_ones(names: list[str]) -> list[str]:
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 1
        while names[i] in taken or names[i] == RESERVED:
            number += 1
            names[i] = f"{name}-{number}"
        taken.add(names[i])
    return names


def _name_at(path: Path, depth: int) -> str:
    """The last `depth` parts, joined: fold0/model.pt at 2 is fold0-model."""
    stem = checkpoint_stem(path)
    parents = [part for part in path.parts[:-1] if part not in ("/", "..", ".")]
    return _clean("-".join([*(parents[-(depth - 1) :] if depth > 1 else []), stem]))


def _clean(text: str) -> str:
    # The end of a name that is too long: there, parents and folds differ.
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[-LONGEST_NAME:].lstrip(".-") or "member"


def _shown(path: Path) -> str:
    # A file name may hold bytes that aren't UTF-8; JSON and terminals can't.
    return path.name.encode("utf-8", "replace").decode("utf-8")


def _named(name: str, spec: str, folder: Path) -> tuple[str, _Found]:
    if len(name) > LONGEST_NAME:
        raise ArchiveError(f"member name '{name[:40]}…': {len(name)} characters, expected at most {LONGEST_NAME}")
    if not NAME.fullmatch(name) or name == RESERVED or name.startswith("."):
        raise ArchiveError(f"member name '{name}': expected letters, digits, '.', '_', '-', and not '{RESERVED}'")
    found = _expand(spec, folder)
    if len(found) != 1:
        raise ArchiveError(f"member '{name}': '{spec}' stands for {len(found)} files, expected one")
    return name, found[0]


def _expand(spec: str, folder: Path) -> list[_Found]:
    """Members that one spec stands for."""
    if spec.startswith(TORCHVISION):
        weights = spec.removeprefix(TORCHVISION)
        path = fetch_torchvision(weights)
        return [_Found(path, Path(weights), weights, None, weights)]
    path = (folder / spec).absolute()
    if path.is_file():
        return _found([path])
    if path.is_dir():
        return _found([path]) or _expand_folder(spec, path)
    if glob.has_magic(spec):
        found = _found(Path(match) for match in glob.glob(str(path), recursive=True))
        if not found:
            raise nothing_there(spec, folder)
        return found
    raise nothing_there(spec, folder)


def _expand_folder(spec: str, path: Path) -> list[_Found]:
    """Every checkpoint directly inside, or every directory of save_pretrained; not both, and nothing hidden."""
    inside = [item for item in path.iterdir() if not item.name.startswith(".")]
    files = _found(item for item in inside if item.suffix in SUFFIXES and item.is_file() and not _is_tar(item))
    directories = _found(item for item in inside if item.is_dir())
    if files and directories:
        raise ArchiveError(
            f"members '{spec}': the folder holds checkpoints ({files[0].shown}) and Hugging Face directories "
            f"({directories[0].shown}); name those that are meant"
        )
    foreign = next((item for item in sorted(inside) if _is_foreign_checkpoint(item)), None)
    if foreign is not None and not directories:
        raise ArchiveError(
            f"members '{spec}': the folder holds {_shown(foreign)}, which looks like a checkpoint but doesn't end in "
            f"{', '.join(SUFFIXES)}; rename it, convert it, or name those that are meant"
        )
    if not files and not directories:
        raise ArchiveError(
            f"members '{spec}': the folder holds no {', '.join(SUFFIXES)} file and no directory of save_pretrained"
        )
    return files or directories


def _is_tar(path: Path) -> bool:
    """A real archive of tar, not what PyTorch's examples call model_best.pth.tar."""
    return path.suffix == ".tar" and tarfile.is_tarfile(path)


def _is_foreign_checkpoint(path: Path) -> bool:
    if not path.is_file() or path.suffix in SUFFIXES:
        return False
    return path.suffix in FOREIGN_SUFFIXES or looks_like_checkpoint(path)


def _found(paths: Iterable[Path]) -> list[_Found]:
    """Files and Hugging Face directories among the paths, in natural order; other folders are left out."""
    found = []
    for path in sorted(paths, key=natural):
        if path.is_file():
            if SHARD.search(path.name):
                raise ArchiveError(
                    f"member '{_shown(path)}': one shard of a checkpoint in several files; write one file with "
                    "model.save_pretrained(folder, max_shard_size='1000GB')"
                )
            found.append(_Found(path, path, _shown(path)))
        elif (folder := find_directory(path)) is not None and (weights := find_weights(folder)) is not None:
            found.append(_Found(weights, path, _shown(path), folder))
    return found


def fetch_torchvision(weights: str) -> Path:
    """The file of torchvision weights such as `ResNet50_Weights.IMAGENET1K_V1`, fetched once, then cached.

    Raises:
        ArchiveError: The name is unknown, or what was fetched has the wrong hash.
        NetworkError: The file isn't cached and the network isn't there.
    """
    import torch
    import torchvision  # here: slow to import, and most archives don't need it

    try:
        entry = torchvision.models.get_weight(weights)
    except (ValueError, AttributeError, KeyError):
        raise ArchiveError(f"member '{TORCHVISION}{weights}': unknown weights{_nearest(weights)}") from None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    if cached.is_file():
        return cached
    try:
        entry.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except (URLError, HTTPException, ConnectionError, TimeoutError, HTTPError) as error:
        raise NetworkError(
            f"member '{TORCHVISION}{weights}': can't be fetched ({error}); "
            f"connect, or put {cached.name} into torch's hub cache (TORCH_HOME/hub/checkpoints)"
        ) from None
    except RuntimeError as error:
        raise ArchiveError(f"member '{TORCHVISION}{weights}': {error}") from None
    return cached


def _nearest(weights: str) -> str:
    import torchvision

    known = [
        f"{enum.__name__}.{entry.name}"
        for model in torchvision.models.list_models(module=torchvision.models)
        for enum in [torchvision.models.get_model_weights(model)]
        for entry in enum
    ]
    close = difflib.get_close_matches(weights, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
