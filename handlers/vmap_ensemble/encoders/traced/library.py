"""Turns the paths of a FasterTransformer library and a traced file into a loaded module, or one clear LoadError."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.errors import LoadError

_CLASS = "__torch__.torch.classes.FasterTransformer.Encoder"
_DEVICE = re.compile(rb'torch\.device\("(cuda[:\d]*)"\)')


def load_ft_library(path: str | Path) -> None:
    """Load the library that registers torch.classes.FasterTransformer.Encoder; twice is once.

    Args:
        path: libpyt_fastertransformer.so, or a build under another name (libth_bert.so, libth_transformer.so).

    Raises:
        LoadError: No such file; built for another torch (undefined symbol); another library it needs is missing; it
            registers no FasterTransformer encoder.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(
            f"FasterTransformer library {path.name} is missing: expected it in the archive beside the traced file. "
            "Build it with `python -m fastertransformer.build` and pack it again, or name yours in the settings"
        )
    if _has_encoder():
        return
    try:
        torch.classes.load_library(str(path.resolve()))
    except OSError as error:
        # torch wraps the linker's own message, which names the symbol, in an OSError without it.
        raise LoadError(_explain_load_failure(path, str(error.__cause__ or error))) from error
    if not _has_encoder():
        raise LoadError(
            f"{path.name} loaded, but registers no class FasterTransformer.Encoder: it isn't a FasterTransformer "
            "library, or one of another generation. Build ours with `python -m fastertransformer.build`"
        )


def load_traced(path: str | Path, device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """Load a traced file onto a device; load_ft_library comes first.

    Args:
        path: A TorchScript file made by fastertransformer.trace or by NVIDIA's script.
        device: Where its tensors go.

    Raises:
        LoadError: Missing or damaged file; no library loaded; traced for another version of the class; its code
            is bound to CUDA while the device is a CPU.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"traced file {path.name} is missing: expected it in the archive; pack the archive again")
    code = _read_code(path)
    target = torch.device(device)
    bound = _DEVICE.search(code)
    if bound and target.type != "cuda":
        raise LoadError(
            f"{path.name} was traced on {bound[1].decode()} and its code names that device, but this worker runs on "
            f"{target.type}. Serve it on a GPU, or trace the checkpoint again with "
            "`python -m fastertransformer.trace`, whose files run on both"
        )
    if b"FasterTransformer" in code and not _has_encoder():
        raise LoadError(f"{path.name} needs the FasterTransformer library: load it first (load_ft_library)")
    try:
        return torch.jit.load(str(path), map_location=target).eval()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise LoadError(_explain_trace_failure(path, str(error))) from error


def accepts_token_types(module: torch.jit.ScriptModule) -> bool:
    """Tell whether forward takes token_type_ids as a third input (files of NVIDIA's script take two)."""
    forward: Any = module.forward
    return len(forward.schema.arguments) > 3  # self, input_ids, attention_mask, token_type_ids


def _has_encoder() -> bool:
    try:
        return bool(torch.classes.FasterTransformer.Encoder)
    except RuntimeError:
        return False


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"


def _read_code(path: Path) -> bytes:
    """Return all TorchScript source in the file; a file that is no TorchScript archive is an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            return b"\n".join(archive.read(n) for n in archive.namelist() if n.endswith(".py"))
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path.name} is damaged or no TorchScript file; trace the checkpoint again") from error


def _explain_load_failure(path: Path, message: str) -> str:
    symbol = re.search(r"undefined symbol: (\S+)", message)
    if symbol:
        return (
            f"{path.name} was built for another PyTorch than {torch.__version__} (undefined symbol "
            f"{symbol[1][:120]}). Build it for this one with `python -m fastertransformer.build --force` and "
            "pack the archive again"
        )
    needed = re.search(r"(\S+): cannot open shared object file", message)
    if needed and Path(needed[1]).name != path.name:
        return (
            f"{path.name} needs {needed[1]}, which this machine lacks. Install it, or build a library that needs "
            "PyTorch alone with `python -m fastertransformer.build`"
        )
    return (
        f"{path.name} is no library that loads on this machine ({_first_line(message)}). Build it here with "
        "`python -m fastertransformer.build --force`"
    )


def _explain_trace_failure(path: Path, message: str) -> str:
    mismatch = ("another version of the class", "Unknown type name", "has no attribute", "Expected at most",
                "Expected at least", "missing value for argument", "__setstate__")  # fmt: skip
    if "int8_mode" in message:
        found = re.search(r"int8_mode \d+ is not supported[^\n]*", message)
        return f"{path.name}: {found[0] if found else _first_line(message)}"
    if any(text in message for text in mismatch):
        return (
            f"{path.name} was traced for another version of the FasterTransformer class than the library has "
            f"({_first_line(message)}). Trace the checkpoint again with `python -m fastertransformer.trace`, or pack "
            "the library that the file was traced with"
        )
    if "deserialize object on CUDA" in message or "CUDA device" in message or "NVIDIA driver" in message:
        return f"{path.name} holds CUDA tensors, and no GPU is usable here. Trace the checkpoint again on a CPU"
    return f"{path.name} can't be loaded ({_first_line(message)}). Trace the checkpoint again"
