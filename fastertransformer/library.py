"""C++ sources -> the library with g++, stamped with the torch that it fits."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastertransformer import LIBRARY
from vmap_ensemble.execution.cpu import kernel_library

SOURCES = Path(__file__).resolve().parent / "csrc"
# PyTorch's own headers want C++20 from 2.13 on.
STANDARD = "c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else "c++17"
FLAGS = [f"-std={STANDARD}", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
KERNELS = {"default": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512vl", "-mfma"]}


class BuildError(Exception):
    """The library can't be built as asked; the text says what to do."""


def stamp_path(library: Path) -> Path:
    """Return where the stamp of a library lies: beside it, with the ending .json."""
    return library.with_suffix(".json")


def describe_build(sanitize: bool = False) -> dict[str, Any]:
    """Return what decides whether a built library still fits: torch, its C++ ABI, the sources and the flags."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return {
        "torch": torch.__version__.split("+")[0],
        "cxx11_abi": int(torch._C._GLIBCXX_USE_CXX11_ABI),
        "machine": platform.machine(),
        "sanitize": sanitize,
        "sources_sha256": digest.hexdigest(),
    }


def is_current(library: Path = LIBRARY, sanitize: bool = False) -> bool:
    """Tell whether the library exists and was built from these sources for the installed torch."""
    try:
        stamp = json.loads(stamp_path(library).read_text())
    except (OSError, ValueError):
        return False
    return library.exists() and stamp == describe_build(sanitize)


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, g++ or c++.

    Raises:
        BuildError: There is none.
    """
    found = kernel_library.find_compiler()
    if found is not None:
        return found
    raise BuildError(
        "No C++ compiler: expected g++ 9 or newer on the path (Debian and Ubuntu: apt-get install g++), or the "
        "variable CXX naming one"
    )


def run(command: list[str]) -> None:
    """Run the compiler; its messages become the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed with status {done.returncode}:\n{done.stderr.strip()[-4000:]}")


def list_units() -> list[tuple[str, Path, list[str]]]:
    """Return (object name, source, flags of its own) of every translation unit."""
    kernel = SOURCES / "attention_kernel.cpp"
    names = KERNELS if platform.machine() in ("x86_64", "AMD64") else {"default": []}
    units: list[tuple[str, Path, list[str]]] = [(p.stem, p, []) for p in sorted(SOURCES.glob("*.cpp")) if p != kernel]
    units += [
        (f"kernel_{name}", kernel, [*flags, f"-DFT_KERNEL_NAME=attend_head_{name}"]) for name, flags in names.items()
    ]
    return units


def build(library: Path = LIBRARY, sanitize: bool = False, jobs: int | None = None) -> Path:
    """Compile and link the library, and write its stamp; an older file stays in place until the new one is whole.

    Args:
        library: The file to write.
        sanitize: Build with AddressSanitizer (run Python with LD_PRELOAD=libasan.so then).
        jobs: Compilers at a time; by default one per core, at most four.

    Raises:
        BuildError: No compiler, or it fails.
    """
    compiler = find_compiler()
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    torch_folder = Path(torch.__file__).parent
    for include in ("include", "include/torch/csrc/api/include"):
        flags += ["-isystem", str(torch_folder / include)]
    if sanitize:
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"]
    library = library.resolve()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        units = [(Path(folder) / f"{name}.o", source, own) for name, source, own in list_units()]
        with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
            commands = [[compiler, *flags, *own, "-c", str(src), "-o", str(obj)] for obj, src, own in units]
            list(pool.map(run, commands))
        linked = Path(folder) / library.name
        run(
            [compiler, "-shared", "-fopenmp", *(["-fsanitize=address"] if sanitize else []), "-o", str(linked)]
            + [str(obj) for obj, _, _ in units]
            + [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        )
        stamp_path(library).unlink(missing_ok=True)
        linked.replace(library)
    stamp_path(library).write_text(json.dumps(describe_build(sanitize), indent=2) + "\n")
    return library


def ensure_library(library: Path = LIBRARY, sanitize: bool = False) -> Path:
    """Return the library's path, building it first if it is missing or belongs to another torch or other sources."""
    return library if is_current(library, sanitize) else build(library, sanitize)


def build_asked(options: argparse.Namespace) -> int:
    """Build from the command line; 1 if it can't be done."""
    try:
        current = not options.force and is_current(options.output, options.sanitize)
        path = options.output if current else build(options.output, options.sanitize)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {'current' if current else 'built'} for torch {torch.__version__}")
    return 0
