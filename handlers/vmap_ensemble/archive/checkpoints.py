"""Turns a checkpoint file into a plain state dict, and what it says of its classes.

Nothing here executes what a file holds: pickles are read with `weights_only=True`, always.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vmap_ensemble.archive.labels import classes_in
from vmap_ensemble.archive.wrappers import WRAPPERS, choose_state, choose_submodule, strip_wrappers
from vmap_ensemble.core.states import State
from vmap_ensemble.errors import MemberError, first_line

logger = logging.getLogger(__name__)

# .tar: what PyTorch's own examples call model_best.pth.tar; .ckpt: Lightning's.
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")

# What training scripts save beside weights, all of it mere data: torchvision's `args`, a best accuracy of numpy,
# which numpy 1 and 2 pickle under two names.
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
_HARMLESS: list[Any] = [
    *(argparse.Namespace, np.dtype, np.ndarray),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")),
]


@dataclass(frozen=True)
class Checkpoint:
    """One file: its weights, and class number -> name and how images are prepared, where it says so."""

    state: State
    classes: dict[int, str] | None = None
    preprocessing: Mapping[str, Any] | None = None


def find_checkpoints(paths: Sequence[Path]) -> list[Path]:
    """Files and folders -> checkpoint files, those of a folder by name, without what begins with a dot.

    Raises:
        MemberError: A path does not exist, or a folder holds no checkpoint.
    """
    files: list[Path] = []
    for path in paths:
        inside = path.iterdir() if path.is_dir() else ()
        # macOS writes ._member.pt beside member.pt.
        named = sorted(file for file in inside if file.suffix in SUFFIXES and not file.name.startswith("."))
        found = named if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise MemberError(f"{path}: expected a checkpoint or a folder of them ({', '.join(SUFFIXES)})")
        files += found
    return files


def read_state_dict(path: str | Path, choice: str | None = None) -> State:
    """The weights of `read_checkpoint`."""
    return read_checkpoint(path, choice).state


def read_checkpoint(path: str | Path, choice: str | None = None) -> Checkpoint:
    """Read one checkpoint as a flat state dict on the CPU, memory-mapped.

    Args:
        path: A .pt, .pth, .bin, .ckpt, .tar or .pkl file of torch.save, or a .safetensors file. A dict that wraps the
            state dict, as {"state_dict": ...} does, is unwrapped. What DataParallel, AveragedModel, torch.compile
            and FSDP put into keys is removed; a prefix such as "model." stays, since only the architecture tells.
        choice: Which weights to take where the file holds several: the name of an entry (`model_ema`, or `ema`
            where only one has that in its name), or of a submodule (`model` takes the keys below "model.").

    Returns:
        Key -> tensor, and the classes. Aliased tensors (tied weights) stay aliased. The tensors are views of the
        file: they are read when used, and the file must not change meanwhile.

    Raises:
        MemberError: The file is missing, unreadable, not a state dict, needs more than weights, or holds several.

    Note:
        Files in torch's format from before 1.6 can't be mapped; they are read whole, and the log says so.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise MemberError(f"{path.name}: expected a file ending in {', '.join(SUFFIXES)}, got '{path.suffix}'")
    if not path.is_file():
        raise MemberError(f"{path.name}: no such file")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    chosen, left = choose_state(loaded, path.name, choice)
    _require_tensors(chosen, path.name)
    state = strip_wrappers(chosen, path.name)
    if left is not None:
        state = choose_submodule(state, path.name, left)
    return Checkpoint(state, classes_in(loaded, path.name), _preprocessing_in(loaded))


def _preprocessing_in(loaded: Any) -> Mapping[str, Any] | None:
    found = loaded.get("preprocessing") if isinstance(loaded, Mapping) else None
    return found if isinstance(found, Mapping) else None


def checkpoint_stem(path: Path) -> str:
    """A file's name without what makes it a checkpoint: model_best.pth.tar is model_best."""
    name = path.name
    while Path(name).suffix in SUFFIXES and Path(name).stem:
        name = Path(name).stem
    return name


def looks_like_checkpoint(path: Path) -> bool:
    """Whether torch.save wrote a file, whatever it is called."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise MemberError(f"{path.name}: not a whole safetensors file ({error})") from None


def _read_pickle(path: Path) -> Any:
    mapped = _is_zip(path)
    if mapped and _is_torchscript(path):
        raise MemberError(
            f"{path.name}: a TorchScript file, expected a state dict; save one with "
            "torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if not mapped:
        logger.info("%s: format from before torch 1.6, which can't be memory-mapped; reading it whole", path.name)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise MemberError(
            f"{path.name}: holds more than weights, or is no checkpoint; only tensors are read "
            "(weights_only=True). Save it again with torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise MemberError(f"{path.name}: not a whole torch checkpoint ({first_line(error)})") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.partition("/")[2] == "constants.pkl" for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False  # torch.load says what is wrong


def _require_tensors(state: Any, where: str) -> None:
    if not isinstance(state, Mapping):
        raise MemberError(f"{where}: expected a state dict (name -> tensor), got {type(state).__name__}")
    if not state:
        raise MemberError(f"{where}: the state dict is empty")
    for key, value in state.items():
        if str(key).rpartition(".")[2] == "_extra_state":
            raise MemberError(
                f"{where}: key '{key}' is what get_extra_state gave, which can't be stacked; expected parameters and "
                "buffers alone"
            )
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise MemberError(
                f"{where}: key '{key}' is {type(value).__name__}, expected a tensor; "
                f"a state dict may be wrapped as {', '.join(WRAPPERS)}, or as the one entry with weights"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise MemberError(f"{where}: key '{key}' is sparse or quantised; expected a dense tensor")
