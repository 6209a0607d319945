"""Turns kernels/*.cpp into one shared library for this CPU: the archive's, else one that g++ makes here, once.

It is called through ctypes and needs neither PyTorch's headers nor its ABI: one file serves every version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.process import cache

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
CACHE = cache.CACHE / "kernels"
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi")
_COMPILE_TIMEOUT_S = 120


@dataclass(frozen=True)
class InstructionSet:
    """What a library is compiled for.

    Attributes:
        name: As in its file's name.
        lanes: Floats in a register.
        flags: The compiler's.
    """

    name: str
    lanes: int
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """The library's name, which tells what it is made of."""
        made_of = hashlib.sha256(repr((_FLAGS, self.lanes, self.flags)).encode())
        for source in sorted(SOURCES.glob("*.[ch]*")):
            made_of.update(source.name.encode() + b"\0" + source.read_bytes())
        return f"kernels-{self.name}-{made_of.hexdigest()[:12]}.so"


_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma")
# By `capability`, the widest last.
INSTRUCTION_SETS = {
    "AVX2": InstructionSet("avx2", 8, ("-mavx2", "-mfma")),
    "AVX512": InstructionSet("avx512", 16, _AVX512),
    "AVX512_VNNI": InstructionSet("avx512vnni", 16, (*_AVX512, "-mavx512vnni")),
}


def instruction_set() -> InstructionSet | None:
    """What the kernels are compiled for on this machine; None if its CPU is another one."""
    return INSTRUCTION_SETS.get(capability()) if runs_kernels() else None


def capability() -> str:
    """What PyTorch reports of this CPU, and whether it multiplies 8-bit numbers."""
    name = torch.backends.cpu.get_cpu_capability()
    return f"{name}_VNNI" if name == "AVX512" and "avx512_vnni" in _cpu_flags() else name


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def runs_kernels() -> bool:
    """Whether this is a machine whose libraries have the kernels' form: Linux on an x86-64 CPU."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


def build_library(target: InstructionSet, folder: Path) -> Path:
    """Compile the library into a folder, unless it is there.

    Args:
        target: The instruction set; not necessarily this CPU's.
        folder: Made if it is missing.

    Returns:
        The file, which appears there in one step.

    Raises:
        LoadError: No C++ compiler, it fails, or the folder can't be written to.
    """
    path = folder / target.file
    if path.exists():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise LoadError("no C++ compiler: expected g++ 9 or newer on the path, or the variable CXX naming one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compile_ = [compiler, *_FLAGS, *target.flags, f"-DLANES={target.lanes}", "-c"]
            objects = []
            for source in sorted(SOURCES.glob("*.cpp")):
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                _run([*compile_, str(source), "-o", objects[-1]])
            linked = Path(scratch) / path.name
            # Without -fopenmp: its functions are found in PyTorch's OpenMP; another would have threads of its own.
            _run([compiler, "-shared", *objects, "-o", str(linked)])
            os.replace(linked, path)
    except OSError as error:
        raise LoadError(f"{path.name} can't be written: {error.strerror}") from error
    return path


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or c++; None if there is none."""
    names = filter(None, [os.environ.get("CXX"), "g++", "c++"])
    return next(filter(None, map(shutil.which, names)), None)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{command[0]} took more than {_COMPILE_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        told = next((line for line in lines if "error" in line), lines[0])
        raise LoadError(f"{command[0]} failed with status {done.returncode}: {told}")


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library for this CPU; None, with a line in the log, where there is none and none can be made."""
    target = instruction_set()
    if target is None:
        return None
    try:
        packed = SOURCES / target.file
        return _open(packed if packed.exists() else build_library(target, CACHE))
    except (LoadError, OSError) as error:
        logger.warning("convolutions, single rows and encoders run without kernels of our own: %s", first_line(error))
        return None


def library_name() -> str | None:
    """What the library's file is called; None where there is none."""
    library = load_library()
    return None if library is None else Path(library._name).name


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.winograd_pack.argtypes = [number, pointer, pointer, size, size]
    library.winograd_convolve.argtypes = [number, *[pointer] * 6, number, number, number]
    library.single_row_multiply.argtypes = [number, *[pointer] * 5, number, number]
    library.encoder_pack.argtypes = [pointer, pointer, size, size]
    library.encoder_pack_int8.argtypes = [pointer, pointer, pointer, size, size]
    library.encoder_int8_floats.argtypes, library.encoder_int8_floats.restype = [size, size], size
    library.encoder_run.argtypes = [*[pointer] * 6, number, number, number, real, real, number, number]
    return library
