"""Turns what a user calls a member (a file, folder, glob, torchvision name) into named checkpoint files."""

from __future__ import annotations

import difflib
import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

from vmap_ensemble.checkpoints import SUFFIXES
from vmap_ensemble.errors import ArchiveError

TORCHVISION = "torchvision:"
NAME = re.compile(r"[A-Za-z0-9._-]+")
# members/shared.safetensors is what all members share.
RESERVED = "shared"


class NetworkError(ArchiveError):
    """Weights must be fetched and the network is not there."""


@dataclass(frozen=True)
class Source:
    """One member before it is packed: its name, its file, and how it is shown (never an absolute path)."""

    name: str
    path: Path
    shown: str


def resolve_members(specs: Sequence[str] | dict[str, str], folder: Path) -> list[Source]:
    """Find the checkpoint of every member and give each a name.

    Args:
        specs: Files, folders (every checkpoint directly inside), globs, or
            `torchvision:ResNet50_Weights.IMAGENET1K_V1`; or name -> one of these that stands for one file.
        folder: Where relative paths start.

    Returns:
        Members in the order given; those of a folder or a glob in natural order (m2 before m10).

    Raises:
        ArchiveError: Nothing is given or found, a file is given twice, or a name isn't allowed.
        NetworkError: Weights of torchvision aren't cached and can't be fetched.
    """
    if isinstance(specs, dict):
        return [_named(name, spec, folder) for name, spec in specs.items()]
    found = [item for spec in specs for item in _expand(spec, folder)]
    if not found:
        raise ArchiveError("no members: expected at least one checkpoint; give --members or the key 'members'")
    twice = [path for path, count in Counter(path.resolve() for path, _ in found).items() if count > 1]
    if twice:
        raise ArchiveError(f"member '{twice[0].name}' is given twice; name both to keep them: {{name: path}}")
    names = unique_names([Path(shown) if shown else path for path, shown in found])
    return [Source(name, path, shown or _shown(path)) for name, (path, shown) in zip(names, found, strict=True)]


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
    stem = path.name if path.suffix not in SUFFIXES else path.stem
    parents = [part for part in path.parts[:-1] if part not in ("/", "..", ".")]
    return _clean("-".join([*(parents[-(depth - 1) :] if depth > 1 else []), stem]))


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".-") or "member"


def _shown(path: Path) -> str:
    # A file name may hold bytes that aren't UTF-8; JSON and terminals can't.
    return path.name.encode("utf-8", "replace").decode("utf-8")


def _named(name: str, spec: str, folder: Path) -> Source:
    if not NAME.fullmatch(name) or name == RESERVED or name.startswith("."):
        raise ArchiveError(f"member name '{name}': expected letters, digits, '.', '_', '-', and not '{RESERVED}'")
    found = _expand(spec, folder)
    if len(found) != 1:
        raise ArchiveError(f"member '{name}': '{spec}' stands for {len(found)} files, expected one")
    path, shown = found[0]
    return Source(name, path, shown or _shown(path))


def _expand(spec: str, folder: Path) -> list[tuple[Path, str]]:
    """Files that one spec stands for, each with the text to show instead of its name, if any."""
    if spec.startswith(TORCHVISION):
        weights = spec.removeprefix(TORCHVISION)
        return [(fetch_torchvision(weights), weights)]
    path = (folder / spec).absolute()
    if path.is_file():
        return [(path, "")]
    if path.is_dir():
        inside = [item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file()]
        if not inside:
            raise ArchiveError(f"members '{spec}': the folder holds no {', '.join(SUFFIXES)} file")
        return [(item, "") for item in sorted(inside, key=_natural)]
    if glob.has_magic(spec):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ArchiveError(f"members '{spec}': no file matches; a glob starts at {folder.name or folder}/")
        return [(item, "") for item in sorted(files, key=_natural)]
    raise ArchiveError(f"member '{spec}': no such file or folder")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """seed2 before seed10."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts]


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
