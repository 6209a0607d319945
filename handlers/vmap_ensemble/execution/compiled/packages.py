"""Turns the compiled forwards of an archive (compiled/*.pt2) into one callable, after checking that they belong here.

    compiled/batch-1-1.pt2    for one example      compiled/batch-2-8.pt2     for 2 to 8
    compiled/compiled.json    what they were compiled for, and their SHA-256

A .pt2 holds native code, which loading runs: it is as trusted as the handler file beside it, no more and no less.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.archive.manifest import hash_file
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError, first_line

COMPILED_FOLDER = "compiled"
COMPILED_FILE = f"{COMPILED_FOLDER}/compiled.json"
COMPILED_FORMAT = 1


class CompiledMismatch(LoadError):
    """The archive's compiled forward was made for something else than what loads it."""


@dataclass(frozen=True)
class Package:
    """One .pt2, for batches of `smallest` to `largest` examples."""

    file: str
    smallest: int
    largest: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Target:
    """What native code is compiled for; all of it must fit where it is loaded.

    Attributes:
        torch: Version; the code calls torch's libraries.
        architecture: Of the processor, such as x86_64.
        features: Instruction sets that the code may use.
        device: `cpu` or `cuda`.
        dtype: Of the members, such as float32.
        example: Shape of one example.
        members: SHA-256 of the members' files, whose weights are in the code's constants.
    """

    torch: str
    architecture: str
    features: tuple[str, ...]
    device: str
    dtype: str
    example: tuple[int, ...]
    members: tuple[str, ...]

    def check(self, here: Target) -> None:
        """Refuse to load where something else runs.

        Args:
            here: What loads it.

        Raises:
            CompiledMismatch: Names the first thing that differs.
        """
        for name in ("torch", "architecture", "device", "dtype", "example", "members"):
            expected, got = getattr(self, name), getattr(here, name)
            if expected != got:
                shown = "" if name == "members" else f" for {expected}, here it is {got}"
                raise CompiledMismatch(
                    f"{COMPILED_FILE}: {name}: compiled{shown or ' with other members'}; "
                    "build the archive anew with --compile, here or on a machine like this one"
                )
        missing = sorted(set(self.features) - set(here.features))
        if missing:
            raise CompiledMismatch(
                f"{COMPILED_FILE}: features: compiled for a processor with {', '.join(missing)}, which this one "
                "lacks; build the archive anew with --compile on a machine like this one"
            )


def target_here(members: StackedMembers, example: Sequence[int]) -> Target:
    """What code that is compiled here, for these members and examples of this shape, is good for."""
    floating = next((tensor.dtype for tensor in members.tensors() if tensor.is_floating_point()), torch.float32)
    told: Mapping[str, Any] = torch.cpu.get_capabilities()
    return Target(
        torch=torch.__version__,
        architecture=str(told["architecture"]),
        features=tuple(sorted(name for name, has in told.items() if has is True)),
        device=members.device.type,
        dtype=str(floating).removeprefix("torch."),
        example=tuple(example),
        members=tuple(member.sha256 for member in members.members),
    )


def write_compiled(folder: Path, target: Target, packages: Sequence[Package]) -> None:
    """Write compiled.json beside the packages."""
    rows = {
        "format": COMPILED_FORMAT,
        "target": dataclasses.asdict(target),
        "packages": [dataclasses.asdict(package) for package in packages],
    }
    (folder / COMPILED_FILE).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def read_compiled(folder: Path) -> tuple[Target, tuple[Package, ...]]:
    """Read compiled.json.

    Raises:
        LoadError: It is malformed.
    """
    try:
        rows = json.loads((folder / COMPILED_FILE).read_text(encoding="utf-8"))
        lists = {key: tuple(value) for key, value in rows["target"].items() if isinstance(value, list)}
        packages = tuple(Package(**row) for row in rows["packages"])
        return Target(**{**rows["target"], **lists}), packages
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{COMPILED_FILE}: malformed ({error}); build the archive again") from None


class CompiledForward:
    """The members' forward as native code: tensors (B, ...) -> (M, B, ...).

    Args:
        folder: The unpacked archive.
        members: The members that were loaded from it.
        example: Shape of one example that will be served.

    Raises:
        CompiledMismatch: It was compiled for another torch, processor, device, dtype, shape, or other members.
        LoadError: A file is missing, was changed after it was archived, or can't be loaded.
    """

    def __init__(self, folder: Path, members: StackedMembers, example: Sequence[int]) -> None:
        target, packages = read_compiled(folder)
        target.check(target_here(members, example))
        self.packages = packages
        self._loaded = [_load(folder, package) for package in packages]

    def __call__(self, x: Tensor) -> Tensor:
        """Run all members on a batch; one larger than what was compiled for goes through in pieces."""
        largest = self.packages[-1].largest
        if len(x) > largest:
            return torch.cat([self(piece) for piece in x.split(largest)], dim=1)
        for package, loaded in zip(self.packages, self._loaded, strict=True):
            if package.smallest <= len(x) <= package.largest:
                return loaded.run([x.contiguous()])[0]
        raise LoadError(f"{COMPILED_FILE}: holds nothing for a batch of {len(x)}")


def _load(folder: Path, package: Package) -> Any:
    path = folder / package.file
    if not path.is_file():
        raise LoadError(f"{package.file}: missing in the archive, but {COMPILED_FILE} lists it")
    if hash_file(path) != package.sha256:
        raise LoadError(f"{package.file}: changed after it was archived (SHA-256); its code is not run")
    try:
        # torch._inductor.aoti_load_package would import the whole compiler, which takes seconds.
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise LoadError(f"{package.file}: can't be loaded ({first_line(error)})") from None
