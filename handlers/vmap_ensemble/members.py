"""Turns the members of an unpacked archive into stacked parameters and buffers, one member at a time.

In an archive, members/<name>.safetensors holds what differs between the members, members/shared.safetensors
what is identical in all, and members.json lists them all with SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vmap_ensemble.checkpoints import (
    Spec,
    check_architecture,
    compare_members,
    find_shared,
    find_ties,
    fit_to_architecture,
    read_state_dict,
    spec_of,
)
from vmap_ensemble.errors import LoadError, MemberError

__all__ = [
    "Manifest",
    "Member",
    "StackedMembers",
    "check_architecture",
    "check_hashes",
    "compare_members",
    "fit_to_architecture",
    "load_members",
    "read_manifest",
    "read_state_dict",
    "stack_members",
]

MANIFEST_FILE = "members.json"
MEMBERS_FOLDER = "members"
MANIFEST_FORMAT = 1

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Member:
    """One row of the manifest: a file of the archive."""

    name: str
    file: str
    sha256: str
    source: str
    size_bytes: int
    # Of the checkpoint that the member was made from, so that a user finds their own file again.
    source_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What members.json says: the members, the file of what they share, and tied key -> kept key."""

    members: tuple[Member, ...]
    shared: Member | None = None
    ties: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> tuple[Member, ...]:
        """All rows that stand for a file, the shared one last."""
        return self.members + ((self.shared,) if self.shared else ())

    def to_json(self) -> str:
        """The text of members.json."""
        rows = {
            "format": MANIFEST_FORMAT,
            "members": [dataclasses.asdict(member) for member in self.members],
            "shared": dataclasses.asdict(self.shared) if self.shared else None,
            "ties": dict(self.ties),
        }
        return json.dumps(rows, indent=2) + "\n"


@dataclass(frozen=True)
class StackedMembers:
    """M state dicts of one architecture, ready for vmap.

    Attributes:
        names: Names of the members, in the order of axis 0.
        stacked: Key -> tensor (M, ...): differs between members.
        shared: Key -> tensor (...): identical in all members, kept once.
        ties: Tied key -> kept key; in `stacked` or `shared` both hold the same tensor object.
        members: Rows of the manifest; empty when stacked in memory.
    """

    names: tuple[str, ...]
    stacked: dict[str, Tensor]
    shared: dict[str, Tensor]
    ties: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Member, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Those that differ between members, (M, ...), and those that all share, (...)."""
        return [*self.stacked.values(), *self.shared.values()]

    @property
    def device(self) -> torch.device:
        """Where the members are.

        Raises:
            LoadError: There is no tensor.
        """
        tensor = next(iter(self.tensors()), None)
        if tensor is None:
            raise LoadError("the members hold no tensors; expected at least one parameter or buffer")
        return tensor.device

    def spec(self) -> dict[str, Spec]:
        """Key -> (shape, dtype) of one member, for `check_architecture`."""
        own = {key: tensor[0] for key, tensor in self.stacked.items()}
        return spec_of({**own, **self.shared})

    def size_bytes(self) -> int:
        """Bytes of all tensors; tied ones count once."""
        tensors = {id(tensor): tensor for tensor in self.tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def stack_members(
    states: Mapping[str, Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> StackedMembers:
    """Stack state dicts that are in memory, for a benchmark, a notebook or a test.

    Args:
        states: Name of the member -> its state dict; aliased tensors count as tied.
        device: Where the stack goes.
        dtype: Floating point tensors are cast to it; integers never. None keeps each tensor's own.

    Raises:
        MemberError: The state dicts don't have the same keys, shapes and dtypes.
    """
    compare_members({name: spec_of(state) for name, state in states.items()})
    rows = list(states.values())
    ties, shared_keys = find_ties(rows), set(find_shared(rows))
    kept = {key: spec for key, spec in spec_of(rows[0]).items() if key not in ties}
    stacked = _allocate({k: s for k, s in kept.items() if k not in shared_keys}, len(rows), device, dtype)
    for index, state in enumerate(rows):
        for key, stack in stacked.items():
            stack[index].copy_(state[key])
    shared = {key: _place(rows[0][key], device, dtype) for key in kept if key in shared_keys}
    return _with_ties(StackedMembers(tuple(states), stacked, shared, ties))


def load_members(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> StackedMembers:
    """Load the members of an unpacked archive into preallocated stacks, one after another.

    Args:
        folder: The unpacked archive; holds members.json and members/.
        device: Where the stack goes, such as "cuda:0".
        dtype: Floating point tensors are cast to it; integers never. None keeps each tensor's own.
        progress: Called as progress(name, i, n) after member i of n (from 1) is in the stack.

    Returns:
        The stacked members: (M, ...) for what differs, (...) for what all share.

    Raises:
        LoadError: The manifest is missing or broken, or the files don't match it: missing, left over,
            cut short, or unlike the first member.

    Note:
        Host memory peaks at the stack (on the CPU) plus one member, whose file is mapped while it is copied.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    spec = _common_spec(folder, manifest)
    stacked = _allocate(spec, len(manifest.members), device, dtype)
    for index, member in enumerate(manifest.members):
        with _open(folder, member) as file:
            for key, stack in stacked.items():
                stack[index].copy_(file.get_tensor(key))
        if progress is not None:
            progress(member.name, index + 1, len(manifest.members))
    shared: dict[str, Tensor] = {}
    if manifest.shared is not None:
        with _open(folder, manifest.shared) as file:
            shared = {key: _place(file.get_tensor(key), device, dtype) for key in file.keys()}  # noqa: SIM118
    names = tuple(member.name for member in manifest.members)
    return _with_ties(StackedMembers(names, stacked, shared, manifest.ties, manifest.members))


def read_manifest(folder: str | Path) -> Manifest:
    """Read members.json and count the files it lists.

    Raises:
        LoadError: It is missing or malformed, or a file is missing, unlisted or of another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise LoadError(f"{MANIFEST_FILE}: not in the archive; build archives with ./archive.sh")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(
            members=tuple(Member(**row) for row in rows["members"]),
            shared=Member(**rows["shared"]) if rows["shared"] else None,
            ties=dict(rows["ties"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{MANIFEST_FILE}: malformed ({error}); build the archive again") from None
    _check_files(folder, manifest)
    return manifest


def check_hashes(folder: str | Path, manifest: Manifest) -> None:
    """Compare every file of the manifest with its SHA-256.

    Raises:
        LoadError: A file holds other bytes than when it was archived.
    """
    for row in manifest.files():
        got = hash_file(Path(folder) / row.file)
        if got != row.sha256:
            raise LoadError(
                f"{row.file}: SHA-256 is {got[:12]}…, {MANIFEST_FILE} says {row.sha256[:12]}…; "
                "the file changed after it was archived"
            )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_files(folder: Path, manifest: Manifest) -> None:
    if not manifest.members:
        raise LoadError(f"{MANIFEST_FILE}: lists no members; expected at least one")
    listed = [row.file for row in manifest.files()]
    for kind, values in (("file", listed), ("name", [member.name for member in manifest.members])):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise LoadError(f"{MANIFEST_FILE}: {kind} '{twice}' is listed twice")
    for row in manifest.files():
        parts = PurePosixPath(row.file).parts
        if len(parts) != 2 or parts[0] != MEMBERS_FOLDER or parts[1] == "..":
            raise LoadError(f"{MANIFEST_FILE}: file '{row.file}' is not of the form {MEMBERS_FOLDER}/<name>")
        path = folder / row.file
        if not path.is_file():
            raise LoadError(f"{row.file}: missing in the archive, but {MANIFEST_FILE} lists it for '{row.name}'")
        if path.stat().st_size != row.size_bytes:
            raise LoadError(
                f"{row.file}: {path.stat().st_size} bytes, {MANIFEST_FILE} says {row.size_bytes}; "
                "the file is cut short or was replaced"
            )
    found = {f"{MEMBERS_FOLDER}/{path.name}" for path in (folder / MEMBERS_FOLDER).iterdir()}
    extra = sorted(found - set(listed))
    if extra:
        raise LoadError(f"{extra[0]}: in the archive, but {MANIFEST_FILE} doesn't list it")


@contextmanager
def _open(folder: Path, row: Member) -> Any:
    """A mapped safetensors file; errors in it name the member."""
    try:
        with safe_open(folder / row.file, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{row.file}: member '{row.name}' can't be read ({error})") from None


def _common_spec(folder: Path, manifest: Manifest) -> dict[str, Spec]:
    """Key -> (shape, dtype) of the members, from the files' headers alone; all must agree."""
    specs: dict[str, dict[str, Spec]] = {}
    for member in manifest.members:
        with _open(folder, member) as file:
            specs[member.file] = {
                key: (tuple(file.get_slice(key).get_shape()), file.get_tensor(key).dtype)
                for key in file.keys()  # noqa: SIM118 (no mapping)
            }
    try:
        compare_members(specs)
    except MemberError as error:
        raise LoadError(str(error)) from None
    return specs[manifest.members[0].file]


def _allocate(
    spec: Mapping[str, Spec], count: int, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {
        key: torch.empty((count, *shape), dtype=_target(own, dtype), device=device)
        for key, (shape, own) in spec.items()
    }


def _place(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    # A copy even when nothing changes: the tensor is a view of a mapped file that is about to be closed.
    return tensor.detach().to(device=device, dtype=_target(tensor.dtype, dtype), copy=True)


def _target(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _with_ties(members: StackedMembers) -> StackedMembers:
    """Add the tied keys, each as the tensor object that stands for it."""
    for key, kept in members.ties.items():
        for tensors in (members.stacked, members.shared):
            if kept in tensors:
                tensors[key] = tensors[kept]
                break
        else:
            raise LoadError(f"{MANIFEST_FILE}: '{key}' is tied to '{kept}', which no file holds")
    return members
