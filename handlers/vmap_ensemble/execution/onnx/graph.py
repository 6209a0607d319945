"""Turns a forward into ONE ONNX graph of all members: one member is exported, its nodes are repeated for the others.

    inputs -> what all members share, once -> each member's nodes on its own weights -> stack -> outputs (M, B, ...)

An exporter given all members would trace M times the same network, and repeat what they share.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.quiet import quietly

if TYPE_CHECKING:
    import onnx_ir as ir

# The first whose operators the exporter writes without conversion.
OPSET = 20
_MODEL = "model"


@dataclass(frozen=True)
class MembersGraph:
    """All members as one graph.

    Attributes:
        model: Its inputs are the forward's arguments; its outputs the tensors of what it returns, each (M, B, ...).
        inputs: Their names, in the order of the arguments that are tensors.
        outputs: Their names, in the order of torch's pytree.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def reasons_against(forward: Forward) -> list[str]:
    """Why no graph can be made of a forward; empty if one can."""
    if not isinstance(forward, EnsembleForward):
        return [f"{type(forward).__name__} runs modules that are traced already"]
    dtypes = {tensor.dtype for tensor in forward.members.tensors() if tensor.is_floating_point()}
    return [] if dtypes == {torch.float32} else ["expected members in float32"]


def export_members(forward: EnsembleForward, args: Sequence[Any]) -> MembersGraph:
    """Make one graph of all members, for any batch size and any length.

    Args:
        forward: One that `reasons_against` has nothing against; its members' tensors are not copied.
        args: Its arguments for a batch, texts of at least two tokens. Axis 0 is the batch; axis 1 of whole numbers
            is the length.

    Raises:
        LoadError: The architecture can't be exported, in the exporter's first line.
    """
    args = two_rows(args)
    names = forward.argument_names(args)
    given = [arg for arg in args if isinstance(arg, Tensor)]
    member = OneMember(forward, args).eval()
    axes = free_axes(given)
    return _repeat(export_module(member, given, names, (axes,)), forward, tuple(member.names))


def export_module(module: nn.Module, args: Sequence[Tensor], names: Sequence[str], axes: tuple[Any, ...]) -> ir.Model:
    """A module as ONNX, its weights under their own names.

    Args:
        module: In eval mode.
        args: What it is called with.
        names: Of the inputs.
        axes: For each parameter of `forward` the axes that may have any size, as torch.export wants it.

    Raises:
        LoadError: It can't be exported, in the exporter's first line.
    """
    what = type(getattr(module, "model", module)).__name__
    with (
        torch.no_grad(),
        quietly("torch.onnx", "torch.export", "onnxscript", "onnx_ir"),
        redirect_stdout(io.StringIO()),
    ):
        try:
            program = torch.onnx.export(
                module, tuple(args), dynamo=True, verbose=False, optimize=False, opset_version=OPSET,
                input_names=list(names), dynamic_shapes=axes,
            )  # fmt: skip
        except Exception as error:  # whatever an exporter may raise; its text names the operator or the line
            told = first_line(error.__cause__ or error)
            raise LoadError(f"{what} can't be exported to ONNX: {told}") from error
    if program is None:
        raise LoadError(f"{what} can't be exported to ONNX")
    return program.model


class OneMember(nn.Module):
    """One member, called on tensors alone; its outputs' tensors in the order of torch's pytree.

    Args:
        forward: Gives model and weights.
        args: Of a batch; those that are no tensors are constants.
        index: Which member.
    """

    def __init__(self, forward: EnsembleForward, args: Sequence[Any], index: int = 0) -> None:
        super().__init__()
        model = forward.plain_model()
        model.load_state_dict(forward.member_state(index), assign=True, strict=False)
        self.model = model.eval().requires_grad_(False)
        self._forward, self._args = [forward], list(args)  # in a list: no submodule
        with torch.no_grad():
            paths, _ = pytree.tree_flatten_with_path(self._call(*args))
        self.names = [_name(path) for path, leaf in paths if isinstance(leaf, Tensor)]

    def _call(self, *args: Any) -> Any:
        positional, keywords = self._forward[0].bind(*args)
        return self.model(*positional, **keywords)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        args = [next(rest) if isinstance(arg, Tensor) else arg for arg in self._args]
        return [leaf for leaf in pytree.tree_leaves(self._call(*args)) if isinstance(leaf, Tensor)]


class AllMembers(nn.Module):
    """All members one after another, called on tensors alone: their outputs (M, B, ...), and what is made of them.

    Args:
        forward: Gives model and weights.
        args: Of a batch.
        answers: Also gives what this makes of one output.
        answered: The number of that output.
    """

    def __init__(
        self, forward: EnsembleForward, args: Sequence[Any], answers: nn.Module | None = None, answered: int = 0
    ) -> None:
        super().__init__()
        count = len(forward.members.names)
        self.members = nn.ModuleList(OneMember(forward, args, index) for index in range(count))
        self.names: list[str] = self.members[0].names  # type: ignore[assignment]
        self._answers, self._answered = answers, answered

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Run every member on the same batch."""
        rows = [member(*tensors) for member in self.members]
        outputs = [torch.stack(leaves) for leaves in zip(*rows, strict=True)]
        return outputs if self._answers is None else [*outputs, *self._answers(outputs[self._answered])]


def _name(path: tuple[Any, ...]) -> str:
    """What an output is called: `logits` of a mapping, `output` of a tensor alone, `output_1` of a tuple."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
    return "_".join(["output", *parts] if not parts or parts[0].isdigit() else parts)


def two_rows(args: Sequence[Any]) -> tuple[Any, ...]:
    """A batch of two from one of any size: an axis of one would be taken for a constant."""
    return tuple(torch.cat([arg, arg])[:2] if isinstance(arg, Tensor) else arg for arg in args)


def free_axes(args: Sequence[Tensor], bounded: bool = False) -> tuple[dict[int, Any], ...]:
    """For each argument the axes that may have any size: the batch, and the length of what is whole numbers.

    Args:
        args: Of a batch.
        bounded: Whether torch.export finds the sizes' bounds by itself: positions end somewhere.
    """
    dim = torch.export.Dim
    batch, length = (dim.AUTO, dim.AUTO) if bounded else (dim("batch"), dim("length"))
    return tuple(
        {0: batch, 1: length} if arg.dim() == 2 and not arg.is_floating_point() else {0: batch} for arg in args
    )


def _repeat(one: ir.Model, forward: EnsembleForward, names: tuple[str, ...]) -> MembersGraph:
    """The graph of one member -> that of all, on their weights."""
    import onnx_ir as ir

    graph = one.graph
    count = len(forward.members.names)
    own: dict[ir.Value, list[ir.Value]] = {}
    initializers = []
    for name, value in graph.initializers.items():
        weights = _weights_of(name.removeprefix(f"{_MODEL}."), forward)
        if weights is None:
            initializers.append(value)
            continue
        own[value] = [_initializer(f"{name}.{index}", weights[index]) for index in range(count)]
        initializers += own[value]
    nodes: list[ir.Node] = []
    for node in list(graph):
        if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
            raise LoadError(f"can't be exported to ONNX for many members: control flow ({node.op_type})")
        graph.remove(node)
        copies = _copies(node, own, count)
        own.update((value, [made.outputs[i] for made in copies]) for i, value in enumerate(node.outputs) if copies)
        nodes += copies or [node]
    inputs = list(graph.inputs)
    outputs = []
    for name, value in zip(names, list(graph.outputs), strict=True):
        stacked, made = _stack(name, own.get(value, [value] * count))
        nodes += made
        outputs.append(stacked)
    graph.outputs.clear()
    graph.initializers.clear()
    graph.inputs.clear()
    whole = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=graph.opset_imports, name="members"
    )
    model = ir.Model(whole, ir_version=one.ir_version, producer_name="vmap-ensemble")
    return MembersGraph(model, tuple(value.name or "" for value in inputs), names)


def _weights_of(key: str, forward: EnsembleForward) -> Tensor | None:
    """(M, ...) of what differs between the members; None of what all share."""
    key = forward.members.ties.get(key, key)
    return forward.members.stacked.get(key)


def _initializer(name: str, tensor: Tensor) -> ir.Value:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    data = TorchTensor(tensor.detach(), name=name)
    return ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)


def _copies(node: ir.Node, own: dict[ir.Value, list[ir.Value]], count: int) -> list[ir.Node]:
    """The node once for each member; none where it takes only what all share."""
    import onnx_ir as ir

    if not any(value in own for value in node.inputs if value is not None):
        return []
    made = []
    for index in range(count):
        inputs = [own[value][index] if value in own else value for value in node.inputs]
        outputs = [ir.Value(name=f"{v.name}.{index}", shape=v.shape, type=v.type) for v in node.outputs]
        attributes = list(node.attributes.values())
        made.append(
            ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{node.name}.{index}")
        )
    return made


def _stack(name: str, members: list[ir.Value]) -> tuple[ir.Value, list[ir.Node]]:
    """(B, ...) of each member -> (M, B, ...)."""
    import onnx_ir as ir

    kind, shape = members[0].type, members[0].shape
    axis = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [0])], num_outputs=1, name=f"{name}.axis")
    axis.outputs[0].name = f"{name}.axis"
    rows = []
    for index, value in enumerate(members):
        row = ir.Node("", "Unsqueeze", [value, axis.outputs[0]], num_outputs=1, name=f"{name}.row.{index}")
        row.outputs[0].name = f"{name}.row.{index}"
        rows.append(row)
    whole = ir.Value(name=name, type=kind, shape=None if shape is None else ir.Shape([len(members), *shape]))
    joined = ir.Node(
        "",
        "Concat",
        [row.outputs[0] for row in rows],
        [ir.AttrInt64("axis", 0)],
        outputs=[whole],
        name=f"{name}.stack",
    )
    return whole, [axis, *rows, joined]
