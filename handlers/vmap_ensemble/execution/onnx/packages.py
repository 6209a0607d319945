"""Turns one ONNX graph of all members into files of an archive, and these into a path to load, after checking them.

    onnx/members.onnx    the graph; beyond PROTOBUF_BYTES its weights lie beside it, in members.onnx.data
    onnx/onnx.json       names of inputs and outputs, members and files with SHA-256

A graph of standard operators runs no code of its own; custom operators are refused by the engines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vmap_ensemble.archive.manifest import hash_file
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.onnx.graph import MembersGraph

ONNX_FOLDER = "onnx"
ONNX_FILE = f"{ONNX_FOLDER}/onnx.json"
ONNX_FORMAT = 1
GRAPH = "members.onnx"
# A protobuf holds 2 GiB; nodes and names need some of it.
PROTOBUF_BYTES = int(1.8 * 2**30)


@dataclass(frozen=True)
class OnnxFiles:
    """What onnx.json says.

    Attributes:
        inputs, outputs: Names, in the order of the forward's tensors.
        members: SHA-256 of the members' files, whose weights the graph holds.
        files: File below onnx/ -> SHA-256.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    members: tuple[str, ...]
    files: dict[str, str]


def write_graph(graph: MembersGraph, path: Path) -> None:
    """Write a graph as one file, or with its weights in `path`.data beside it where a protobuf can't hold them."""
    import onnx_ir as ir

    weights = [
        value.const_value for value in graph.model.graph.initializers.values() if value.const_value is not None
    ]
    outside = sum(tensor.nbytes for tensor in weights) > PROTOBUF_BYTES
    ir.save(graph.model, path, external_data=f"{path.name}.data" if outside else None)


def write_onnx(graph: MembersGraph, members: StackedMembers, folder: Path) -> None:
    """Write `folder`/onnx.

    Args:
        graph: Of these members.
        members: Their files' SHA-256 tie the graph to them.
        folder: An archive's root.
    """
    root = folder / ONNX_FOLDER
    root.mkdir()
    write_graph(graph, root / GRAPH)
    files = {path.name: hash_file(path) for path in sorted(root.iterdir())}
    shas = tuple(member.sha256 for member in members.members)
    told = {"format": ONNX_FORMAT, **asdict(OnnxFiles(graph.inputs, graph.outputs, shas, files))}
    (folder / ONNX_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_onnx(folder: Path, members: StackedMembers) -> tuple[OnnxFiles, Path]:
    """What the archive brings, and the graph's file.

    Raises:
        LoadError: A file is missing or was changed after it was archived, or the graph is of other members.
    """
    try:
        told = json.loads((folder / ONNX_FILE).read_text(encoding="utf-8"))
        found = OnnxFiles(tuple(told["inputs"]), tuple(told["outputs"]), tuple(told["members"]), dict(told["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{ONNX_FILE}: malformed ({error}); build the archive again") from None
    if found.members != tuple(member.sha256 for member in members.members):
        raise LoadError(f"{ONNX_FILE}: made of other members; build the archive again with --onnx")
    listed, there = set(found.files), {path.name for path in (folder / ONNX_FOLDER).iterdir()} - {"onnx.json"}
    if GRAPH not in listed or listed != there:
        raise LoadError(
            f"{ONNX_FOLDER}: expected {', '.join(sorted(listed | {GRAPH}))}, got {', '.join(sorted(there))}"
        )
    for name, digest in found.files.items():
        if hash_file(folder / ONNX_FOLDER / name) != digest:
            raise LoadError(f"{ONNX_FOLDER}/{name}: changed after it was archived (SHA-256); it is not loaded")
    return found, folder / ONNX_FOLDER / GRAPH
