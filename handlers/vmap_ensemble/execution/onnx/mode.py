"""Registers the modes `onnxruntime` and `openvino`: the archive's ONNX graph of all members, or one made at load."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.onnx.engines import Engine, load_onnxruntime, load_openvino
from vmap_ensemble.execution.onnx.graph import export_members, reasons_against
from vmap_ensemble.execution.onnx.packages import GRAPH, read_onnx, write_graph
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args

# Exporting can't be interrupted: `auto` does it at load only if this much of its budget is left.
EXPORT_NEEDS_S = 60.0
EXPORTERS = ("onnx", "onnxscript")
Load = Callable[[Path, Sequence[str], Sequence[str], torch.device], Engine]


class GraphForward:
    """The forward, by an engine: arguments (B, ...) -> the model's own output structure, each tensor (M, B, ...).

    Args:
        engine: Runs the graph.
        forward: Gives the structure, which a call of its first member shows.
        args: Of a batch.
    """

    def __init__(self, engine: Engine, forward: Forward, args: Args) -> None:
        self.engine = engine
        self.leaves, self.structure = pytree.tree_flatten(forward.member(0, *args))

    def __call__(self, *args: Any) -> Any:
        """Run all members on a batch."""
        outputs = iter(self.engine([arg.contiguous() for arg in args if isinstance(arg, Tensor)]))
        leaves = [next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


def seconds_needed(options: ExecutionOptions) -> float:
    """None where the archive brings the graph, which is only loaded."""
    return EXPORT_NEEDS_S if options.graph_folder is None else 0.0


def _reasons(package: str) -> Callable[[Forward, Sequence[Args], ExecutionOptions], list[str]]:
    def reasons(forward: Forward, _examples: Sequence[Args], options: ExecutionOptions) -> list[str]:
        wanted = [package, *(EXPORTERS if options.graph_folder is None else ())]
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        found = [f"{', '.join(missing)}: not installed"] if missing else []
        return found + reasons_against(forward)

    return reasons


def _version(package: str) -> Callable[[Forward], str | None]:
    def version(_forward: Forward) -> str | None:
        if importlib.util.find_spec(package) is None:
            return None
        return f"{package} {importlib.metadata.version(package)}"

    return version


@mode(
    "onnxruntime",
    what="ONNX Runtime on one graph of all members",
    place=4,
    reasons_against=_reasons("onnxruntime"),
    needs_s=seconds_needed,
    library=_version("onnxruntime"),
)
def build_onnxruntime(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """A session on the archive's graph."""
    return _build(load_onnxruntime, forward, examples, options)


@mode(
    "openvino",
    what="OpenVINO on one graph of all members",
    place=5,
    devices=("cpu",),
    reasons_against=_reasons("openvino"),
    needs_s=seconds_needed,
    library=_version("openvino"),
)
def build_openvino(forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """A compiled model of the archive's graph."""
    return _build(load_openvino, forward, examples, options)


def _build(load: Load, forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    with ExitStack() as stack:
        if options.graph_folder is not None:
            found, path = read_onnx(options.graph_folder, forward.members)
            inputs, outputs = found.inputs, found.outputs
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmap-ensemble-"))) / GRAPH
            assert isinstance(forward, EnsembleForward)  # `reasons_against` has nothing against it
            graph = export_members(forward, max(examples, key=lambda args: len(args[0])))
            write_graph(graph, path)
            inputs, outputs = graph.inputs, graph.outputs
        engine = load(path, inputs, outputs, forward.members.device)
    given = sum(isinstance(arg, Tensor) for arg in examples[0])
    if given != len(inputs):
        raise LoadError(f"the graph takes {len(inputs)} tensors ({', '.join(inputs)}), the forward {given}")
    return Built(GraphForward(engine, forward, examples[0]))
