"""Turns traced FasterTransformer files and their library, or the Hugging Face directories to trace, into members."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archiver import HANDLERS, HOME, ROOT
from archiver.blocks.request import ArchiveRequest
from archiver.source import Source
from vmap_ensemble.archive.manifest import MEMBERS_FOLDER, Manifest, hash_file
from vmap_ensemble.core.members import Member
from vmap_ensemble.errors import ArchiveError

LIBRARY = "libpyt_fastertransformer.so"
TOOLS = "fastertransformer"
TOOL_TIMEOUT_S = 1800

Step = Callable[[str], None]


@dataclass(frozen=True)
class TracedMembers:
    """TorchScript files that are packed as they are, and the library whose classes they call."""

    sources: tuple[Source, ...]
    hashes: tuple[str, ...]
    library: Path
    library_name: str


def is_traced(settings: Mapping[str, Any]) -> bool:
    """Whether a block says that its members are TorchScript files."""
    flag = str(
        settings.get("FasterTransformer", "")
    ).lower()  # settings may be text, as TorchServe's example has them
    return settings.get("save_mode") == "torchscript" or flag == "true"


def trace_directories(request: ArchiveRequest, sources: Sequence[Source], folder: Path) -> list[Source]:
    """Trace those members that are Hugging Face directories; files stay as they are.

    Args:
        request: Its settings say mode, max_length and dtype.
        sources: The members.
        folder: Where traced files go.

    Raises:
        ArchiveError: Tracing fails; the line is the tracer's.
    """
    return [_trace(request, source, folder) if source.folder is not None else source for source in sources]


def _trace(request: ArchiveRequest, source: Source, folder: Path) -> Source:
    settings = request.settings
    output = folder / f"{source.name}.pt"
    options = [
        *("--mode", str(settings.get("mode", "sequence_classification"))),
        *("--model_name_or_path", str(source.folder), "--max_seq_length", str(settings.get("max_length", 512))),
        *("--data_type", str(settings.get("dtype", "fp32")), "--output", str(output)),
    ]
    if request.library_path is not None:
        options += ["--ths_path", str(request.library_path)]
    _run_tool("trace", options, f"member '{source.name}'")
    return dataclasses.replace(source, path=output)


def _run_tool(name: str, options: Sequence[str], where: str) -> None:
    """Run a command of fastertransformer/ in a process of its own: the library stays out of this one."""
    if not (ROOT / TOOLS / f"{name}.py").is_file():
        raise ArchiveError(f"{where}: {TOOLS}/{name}.py is not installed; give traced .pt files")
    command = [sys.executable, "-m", f"{TOOLS}.{name}", *options]
    path = os.pathsep.join(filter(None, [str(ROOT), str(HANDLERS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        raise ArchiveError(f"{where}: {TOOLS}.{name} failed: {last.removeprefix('error: ')}")


def survey_traced(request: ArchiveRequest, sources: Sequence[Source], step: Step) -> TracedMembers:
    """Check that members are TorchScript files and find their library; none is loaded.

    Raises:
        ArchiveError: A file isn't TorchScript, or the library is missing and can't be built.
    """
    hashes = []
    for source in sources:
        step(f"read {source.name}")
        check_torchscript(source)
        hashes.append(hash_file(source.path))
    step("library")
    name = str(request.settings.get("library") or LIBRARY)
    if Path(name).name != name:
        raise ArchiveError(f"library: expected a file name, got '{name}'; the key 'library_path' says where it lies")
    return TracedMembers(tuple(sources), tuple(hashes), find_library(request, name), name)


def check_torchscript(source: Source) -> None:
    """Refuse a file that torch.jit.save didn't write, by its layout alone.

    Raises:
        ArchiveError: It is no zip, or one without code, such as a state dict.
    """
    try:
        with zipfile.ZipFile(source.path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ArchiveError(f"{source.shown}: not a TorchScript file ({error})") from None
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" not in inside or not any(name.startswith("code/") for name in inside):
        raise ArchiveError(
            f"{source.shown}: not a TorchScript file: it holds no code; with save_mode 'torchscript' members are "
            "what torch.jit.save wrote, or Hugging Face directories, which are traced"
        )


def find_library(request: ArchiveRequest, name: str) -> Path:
    """The library: the block's `library_path`, or the one that this repository builds.

    Raises:
        ArchiveError: It is missing.
    """
    given = request.library_path
    if given is not None:
        if given.is_file():
            return given
        raise ArchiveError(f"library_path: {given.name}: no such file")
    if name != LIBRARY:
        raise ArchiveError(f"library '{name}': give its file in the key 'library_path'")
    built = HOME / "build" / LIBRARY
    _run_tool("build", ["--output", str(built)], f"library '{name}'")
    return built


def copy_traced(traced: TracedMembers, stage: Path, step: Step) -> Manifest:
    """Copy members and library into the root of an archive; returns the manifest."""
    rows = []
    for source, digest in zip(traced.sources, traced.hashes, strict=True):
        step(f"write {source.name}")
        file = f"{MEMBERS_FOLDER}/{source.name}.pt"
        shutil.copyfile(source.path, stage / file)
        size = (stage / file).stat().st_size
        rows.append(Member(source.name, file, hash_file(stage / file), source.shown, size, digest))
    step("write library")
    shutil.copyfile(traced.library, stage / traced.library_name)
    return Manifest(tuple(rows))
