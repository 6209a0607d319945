"""Turns a block of setup_config.json and the command line into one ArchiveRequest per archive, paths resolved."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archiver import HANDLERS
from archiver.blocks.block import ARCHIVER_KEYS, MAX_CHANGED_PREDICTIONS, PATH_KEYS, Block, MemberSpecs, check_keys
from vmap_ensemble.errors import ArchiveError

# torch-model-archiver's own rule (model_packaging_utils.py, check_model_name_regex_or_exit).
ARCHIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# File systems take names of 255 bytes; a scratch folder beside the archive has a longer one.
LONGEST_NAME = 200


@dataclass(frozen=True)
class ArchiveRequest:
    """What one archive is made of; paths are absolute."""

    name: str
    folder: Path
    handler: Path
    members: MemberSpecs
    settings: Mapping[str, Any]
    labels: Path | None = None
    model_config: Path | None = None
    model_file: Path | None = None
    extra_files: tuple[Path, ...] = ()
    version: str = "1.0"
    allow_nan: bool = False
    # Brings config.json and the tokenizer where the members don't.
    pretrained: Path | None = None
    # The library that traced members call.
    library_path: Path | None = None
    # Inputs to calibrate int8 on, and to judge any other precision than float32 by.
    samples: tuple[Path, ...] = ()
    # Share of the samples whose prediction may differ from float32's.
    max_changed_predictions: float = MAX_CHANGED_PREDICTIONS
    # Whether the forward is compiled ahead of time and packed as native code.
    compile: bool = False
    # Whether an ONNX graph of all members is packed.
    onnx: bool = False
    # Which weights to take of checkpoints that hold several, such as `ema`.
    checkpoint_weights: str | None = None
    # Whether the archive is loaded once before it is done.
    check: bool = True
    # Whether it is then measured at length how it runs fastest here.
    tune: bool = False


def make_request(
    name: str,
    blocks: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    members: list[str] | None = None,
    handler: str | None = None,
    architecture: str | None = None,
    model_file: str | None = None,
    input_shape: list[int] | None = None,
    labels: str | None = None,
    model_config: str | None = None,
    version: str | None = None,
    set: Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    samples: list[str] | None = None,
    weights: str | None = None,
    allow_nan: bool = False,
    compile: bool = False,
    onnx: bool = False,
    no_check: bool = False,
    tune: bool = False,
) -> ArchiveRequest:
    """Join one block with the command line, which wins.

    Args:
        name: Name of the archive.
        blocks: What `read_blocks` returned; the block may be absent when handler and members are given.
        folder: Where paths inside the block start: the folder of setup_config.json.
        members, handler, ..., tune: From the command line; paths start at the working directory.

    Raises:
        ArchiveError: The name is not allowed, or something that an archive needs is missing.
    """
    if not ARCHIVE_NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ArchiveError(
            f"archive name '{name[:LONGEST_NAME]}': expected letters, digits, '_', '-', '.', at most {LONGEST_NAME}"
        )
    if name not in blocks and not (handler and members):
        raise ArchiveError(f"'{name}' is not in setup_config.json{_hint(name, blocks)}")
    told = {"architecture": architecture, "input_shape": input_shape}
    block = {
        **blocks.get(name, {}),
        **{key: value for key, value in told.items() if value is not None},
        **(set or {}),
    }
    given = {key: block.pop(key) for key in ARCHIVER_KEYS if key in block}
    paths = {"labels": labels, "model_config": model_config, "model_file": model_file, "pretrained": pretrained}
    from_here = {**(set or {}), **{key: value for key, value in paths.items() if value}}
    # From here on a path of the command line is as one of the block: absolute, it starts at no folder.
    given |= {key: _from_here(value) for key, value in from_here.items() if key in PATH_KEYS}
    handler_path = _find_handler(name, handler, block.get("handler"), folder)
    asked = check_keys(name, given | ({"version": version} if version else {}))
    model_path, class_name = _model_file(asked, folder)
    if model_path is not None and (class_name or architecture is None):
        named = f"{model_path.name}:{class_name}" if class_name else model_path.name
        block = {**block, "architecture": named} if model_file else {"architecture": named, **block}
    from_command_line = members is not None
    return ArchiveRequest(
        name=name,
        folder=Path.cwd() if from_command_line else folder,
        handler=handler_path,
        members=members if members is not None else _list_members(asked),
        settings={**block, "name": name, "handler": handler_path.name},
        labels=_absolute(asked.labels, folder),
        model_config=_absolute(asked.model_config, folder),
        model_file=model_path,
        extra_files=tuple(folder / item for item in asked.extra_files),
        version=str(asked.version),
        allow_nan=allow_nan or asked.allow_nan,
        pretrained=_absolute(asked.pretrained, folder),
        library_path=_absolute(asked.library_path, folder),
        samples=_sample_paths(asked, folder, samples),
        max_changed_predictions=asked.max_changed_predictions,
        checkpoint_weights=weights or asked.checkpoint_weights,
        compile=compile,
        onnx=onnx,
        check=not no_check,
        tune=tune,
    )


def check_files(request: ArchiveRequest) -> None:
    """Find what isn't there before anything that takes time is imported.

    Raises:
        ArchiveError: Names the file, and the key that asks for it.
    """
    for path in (request.labels, request.model_config, request.model_file):
        if path is not None and not path.is_file():
            raise ArchiveError(f"'{request.name}': {path.name}: no such file")
    members = request.members.values() if isinstance(request.members, dict) else request.members
    for spec in members:
        path = request.folder / spec
        if ":" not in spec and not path.exists() and not glob.glob(str(path), recursive=True):
            raise nothing_there(spec, request.folder)


def nothing_there(spec: str, folder: Path) -> ArchiveError:
    """What members are refused with that stand for no file."""
    if glob.has_magic(spec):
        return ArchiveError(f"members '{spec}': no file matches; a glob starts at {folder.name or folder}/")
    return ArchiveError(f"member '{spec}': no such file or folder")


def _from_here(value: Any) -> Any:
    """A path of the command line, or a list of them, absolute; what is none is refused where it is read."""
    if isinstance(value, list):
        return [_from_here(part) for part in value]
    return str(Path(value).absolute()) if isinstance(value, str) and value else value


def _model_file(asked: Block, folder: Path) -> tuple[Path | None, str]:
    """The file, and the class in it that `model.py:Class` names."""
    path = _absolute(asked.model_file, folder)
    if path is None:
        return None, ""
    file, colon, class_name = str(path).rpartition(".py:")
    return (Path(f"{file}.py"), class_name) if colon else (path, "")


def _hint(name: str, blocks: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, blocks, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; it holds {', '.join(blocks) or 'no archives'}. Otherwise give --handler and --members"


def _list_members(asked: Block) -> MemberSpecs:
    return [asked.members] if isinstance(asked.members, str) else asked.members


def _sample_paths(asked: Block, folder: Path, given: list[str] | None) -> tuple[Path, ...]:
    if given is not None:
        return tuple(Path(item).absolute() for item in given)
    items = [asked.samples] if isinstance(asked.samples, str) else asked.samples or []
    return tuple((folder / item).absolute() for item in items)


def _find_handler(name: str, given: str | None, in_block: Any, folder: Path) -> Path:
    handler = given or in_block
    if handler is not None and not isinstance(handler, str):
        raise ArchiveError(f"'{name}': handler: expected the name of a .py file, got {handler!r}")
    if not handler:
        raise ArchiveError(f"'{name}': no handler; give --handler or the key 'handler'")
    places = [Path.cwd() if given else folder, HANDLERS]
    for place in places:
        path = place / handler
        if path.is_file() and path.suffix == ".py":
            return path.absolute()
    known = ", ".join(sorted(path.name for path in HANDLERS.glob("*_handler.py")))
    raise ArchiveError(f"'{name}': handler '{handler}': no such .py file; handlers/ holds {known or 'none'}")


def _absolute(path: str | None, folder: Path) -> Path | None:
    return None if path is None else (folder / path).absolute()
