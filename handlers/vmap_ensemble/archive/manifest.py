"""Turns the members of an unpacked archive into stacked parameters and buffers, one member at a time.

In an archive, members/<name>.safetensors holds what differs between the members, members/shared.safetensors
what is identical in all, and members.json lists them all with SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vmap_ensemble.core.members import Member, StackedMembers, allocate_stack, place, with_ties
from vmap_ensemble.core.states import (
    Spec,
    compare_members,
)
from vmap_ensemble.errors import LoadError, MemberError

MANIFEST_FILE = "members.json"
MEMBERS_FOLDER = "members"
MANIFEST_FORMAT = 1
# Of files that are executed.
CODE_SUFFIXES = (".py", ".so")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Manifest:
    """What members.json says.

    Attributes:
        members: One row per member.
        shared: The file of what all members share, if there is one.
        ties: Tied key -> kept key.
        code: File -> SHA-256 of what is executed: Python files and libraries.
    """

    members: tuple[Member, ...]
    shared: Member | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)

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
            "code": dict(self.code),
        }
        return json.dumps(rows, indent=2) + "\n"


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
    stacked = allocate_stack(spec, len(manifest.members), device, dtype)
    shared: dict[str, Tensor] = {}
    with hashes_checked(folder, manifest):
        for index, member in enumerate(manifest.members):
            with _open(folder, member) as file:
                for key, stack in stacked.items():
                    stack[index].copy_(file.get_tensor(key))
            if progress is not None:
                progress(member.name, index + 1, len(manifest.members))
        if manifest.shared is not None:
            with _open(folder, manifest.shared) as file:
                shared = {key: place(file.get_tensor(key), device, dtype) for key in file.keys()}  # noqa: SIM118
    names = tuple(member.name for member in manifest.members)
    return with_ties(StackedMembers(names, stacked, shared, manifest.ties, manifest.members))


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
            code=dict(rows.get("code") or {}),  # archives of earlier versions list none
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


@contextmanager
def hashes_checked(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Compare the members' files with their SHA-256 in a thread, while they are read here; it is done at the end.

    Raises:
        LoadError: A file holds other bytes than when it was archived, though as many.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="hashes") as pool:
        checking = pool.submit(check_hashes, folder, manifest)
        yield
        checking.result()


def check_code(folder: Path, manifest: Manifest) -> None:
    """Compare what is executed, Python files and libraries, with the SHA-256 that the manifest lists.

    Raises:
        LoadError: A file is missing or holds other bytes than when it was archived.
    """
    for file, digest in manifest.code.items():
        path = folder / file
        if not path.is_file():
            raise LoadError(f"{file}: missing in the archive, but {MANIFEST_FILE} lists it")
        if hash_file(path) != digest:
            raise LoadError(f"{file}: changed after it was archived (its SHA-256 isn't {MANIFEST_FILE}'s)")


def list_code(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of the Python files and libraries below a folder, by name."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in CODE_SUFFIXES and path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in found}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    # One small buffer: this runs beside the reading of members, whose peak of memory it must not raise.
    block = memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
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
