"""Turns the plain convolutions and large linear layers of a lowered graph into faster ones on weights packed once.

3x3 convolutions become Winograd's products where that pays (winograd.py), the others and linear layers oneDNN's.

oneDNN's convolution wants its weights in blocks that suit the CPU, and reorders plain ones on every call.
Packed for the example's size they stay right for every other size: oneDNN reorders them where it must.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vmap_ensemble.batching_rules import prepack
from vmap_ensemble.lowered_model import LoweredModel, UnsupportedModel, only_user, replace_node
from vmap_ensemble.lowering import activation_name
from vmap_ensemble.member_threads import MemberThreads
from vmap_ensemble.pooling import halve
from vmap_ensemble.single_row import RowMatrices
from vmap_ensemble.steps import ACTIVATIONS, CONVOLUTIONS, MIN_LINEAR_WEIGHTS, convolve, multiply_members
from vmap_ensemble.winograd import WinogradWeights, choose_tile, convolve_tiles

LINEAR = torch.ops.mkldnn._linear_pointwise.default
_CONVOLVE = torch.ops.mkldnn._convolution_pointwise.default
_ADD = torch.ops.mkldnn._convolution_pointwise.binary
_ADD_IN_PLACE = torch.ops.mkldnn._convolution_pointwise_.binary
_FRESH = (_CONVOLVE, _ADD, _ADD_IN_PLACE, convolve_tiles, halve)  # what they give is nobody else's

# Up to how many bytes a joined linear layer's weights are packed once more, for batches of one.
MAX_SECOND_COPY = 2**28


def record_values(
    lowered: LoweredModel,
    nodes: list[fx.Node],
    example: Sequence[Tensor],
    filled: Mapping[str, list[Any]] | None = None,
    index: int = 0,
) -> dict[fx.Node, Any]:
    """Run one member's plain graph once, to learn every value's kind and shape; the first member's by default.

    Args:
        lowered: The graph.
        nodes: Those of the graph to run.
        example: The model's arguments.
        filled: What fills slots that are no plain tensors, per member.
        index: The member.

    Raises:
        UnsupportedModel: The example doesn't go through the model.
    """
    values: dict[fx.Node, Any] = dict(zip(lowered.arguments(), example, strict=False))
    for node in lowered.graph.nodes:
        if node.name in lowered.slots:
            values[node] = member_slot(lowered, filled or {}, node.name, index)
    interpreter = fx.Interpreter(lowered.root, graph=lowered.graph)
    interpreter.env = values
    for node in nodes:
        try:
            value = interpreter.run_node(node)
            values[node] = value[index] if node in lowered.joined else value
        except Exception as error:
            raise UnsupportedModel(f"the example doesn't fit the model at its step '{node.name}': {error}") from error
    return values


def pack_convolutions(
    lowered: LoweredModel, nodes: list[fx.Node], values: dict[fx.Node, Any]
) -> dict[str, list[Any]]:
    """Replace plain convolutions by faster ones on packed weights, in place.

    Args:
        lowered: The graph; each convolution gets a new slot, for packed weights.
        nodes: Those of the graph to look at.
        values: An example of every node's value.

    Returns:
        Slot name -> packed weights, one per member, or one in all if members share them.
    """
    packed: dict[str, list[Any]] = {}
    order = {node: position for position, node in enumerate(lowered.graph.nodes)}
    with closing(MemberThreads(torch.get_num_threads() if nodes else 1)) as threads:
        for node in list(nodes):
            args: Any = node.args
            if node.target is convolve:
                x, weight, bias, settings, activation = args
                other = None
            elif node.target in CONVOLUTIONS:
                x, other, weight, bias, settings, activation = args
            else:
                continue
            plain = lowered.slots[weight.name]
            shape = plain.shape[1:] if weight.name in lowered.stacked else plain.shape
            unfilled = torch.empty(shape, dtype=plain.dtype, device="meta")
            output = convolve(values[x].to("meta"), unfilled, None, settings, "none").shape
            if other is not None and (values[other].shape != output or values[other].dtype != plain.dtype):
                continue  # it is repeated to be added, or the convolution's value is: only the plain step knows how
            slot = _add_packed_slot(lowered, weight)
            tile = choose_tile(plain.dtype, shape, settings, str(activation), output)
            packed[slot.name] = _pack_weight(lowered, weight, settings, list(values[x].shape), tile, threads)
            in_place = other is not None and is_consumable(lowered, node, (x, other), _FRESH, order, values)
            if tile:
                halved = other is None and _swallow_halving(node, nodes, values)
                node.target = convolve_tiles
                node.args = (x, other, slot, bias, settings[0], str(activation), in_place, halved)
            else:
                _replace_call(node, x, other, slot, bias, settings, str(activation), in_place)
            if not weight.users:
                # What was copied to be packed is given back at once: it never lies beside all of the packed ones.
                lowered.slots[slot.name] = lowered.slots[weight.name] = torch.empty(0)
                values.pop(weight, None)
    return packed


def pack_linears(lowered: LoweredModel, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> dict[str, list[Any]]:
    """Replace large linear layers by oneDNN's, in place; arguments and result as of convolutions.

    A relu behind one becomes part of it, and leaves `nodes`. A layer of all members gets theirs as `JoinedMatrices`.
    """
    packed: dict[str, list[Any]] = {}
    for node in list(nodes):
        if not is_large_linear(lowered, node):
            continue
        x, weight, bias = cast(Any, node.args)
        joined, tensor = node.target is multiply_members, lowered.value(weight.name)
        if values[x].dim() != (3 if joined else 2):
            continue
        slot = _add_packed_slot(lowered, weight)
        packed[slot.name] = [JoinedMatrices.of(tensor)] if joined else prepack(tensor)
        activation = "relu" if _swallow_relu(lowered, node, nodes) else "none"
        node.target = multiply_packed if joined else LINEAR
        node.args = (x, slot, bias, activation) if joined else (x, slot, bias, activation, [], "")
        if joined and not weight.users:
            lowered.slots[slot.name] = lowered.slots[weight.name] = tensor.new_empty(0)
    return packed


@dataclass(frozen=True)
class JoinedMatrices:
    """Every member's matrix of a linear layer, for many rows and for one.

    Attributes:
        each: M matrices, (out, in), in oneDNN's order, for calls per member.
        rows: All of them for single rows, in one call; None where there is no kernel for it, or a second copy would
            take too much memory.
    """

    each: list[Tensor]
    rows: RowMatrices | None

    @classmethod
    def of(cls, weight: Tensor) -> JoinedMatrices:
        """From plain ones, (M, out, in)."""
        return cls(prepack(weight), RowMatrices.of(weight) if weight.nbytes <= MAX_SECOND_COPY else None)


def multiply_packed(x: Tensor, weights: JoinedMatrices, bias: Tensor | None, activation: str) -> Tensor:
    """Every member's linear layer on packed weights: (M, B, in) -> (M, B, out)."""
    count, rows, _ = x.shape
    if rows == 1 and weights.rows is not None:
        return weights.rows.multiply(x, bias, activation)
    biases = [None] * count if bias is None else bias
    parts = zip(x, weights.each, biases, strict=True)
    return torch.stack([LINEAR(row, weight, own, activation, [], "") for row, weight, own in parts])


def is_large_linear(lowered: LoweredModel, node: fx.Node) -> bool:
    """Whether the node is a linear layer that is worth oneDNN's packed weights."""
    if node.target not in (F.linear, multiply_members) or node.kwargs or len(node.args) != 3:
        return False
    weight = lowered.slots.get(getattr(node.args[1], "name", ""))
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return math.prod(weight.shape[-2:]) >= MIN_LINEAR_WEIGHTS


def _swallow_relu(lowered: LoweredModel, node: fx.Node, nodes: list[fx.Node]) -> bool:
    user = only_user(node)
    if user is None or user not in nodes or activation_name(user, lowered.root) != "relu":
        return False
    replace_node(user, node)
    nodes.remove(user)
    return True


def _swallow_halving(node: fx.Node, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> bool:
    """Whether max pooling of 2x2 pixels is all that takes the node's value; it becomes part of the node."""
    user = only_user(node)
    if user is None or user not in nodes or user.target is not halve or user.args[1] != 2:
        return False
    replace_node(user, node)
    nodes.remove(user)
    values[node] = values[user]
    return True


def _pack_weight(
    lowered: LoweredModel, weight: Any, settings: Any, input_size: list[int], tile: int | None, threads: MemberThreads
) -> list[Any]:
    def pack(index: int) -> Any:
        row = lowered.row(weight.name, index)
        if tile:
            return WinogradWeights.of(row, tile, settings[3])
        return torch.ops.mkldnn._reorder_convolution_weight(row.contiguous(), *settings, input_size)

    return threads.map(pack, range(len(lowered.slots[weight.name]) if weight.name in lowered.stacked else 1))


def _replace_call(
    node: fx.Node, x: Any, other: Any, slot: fx.Node, bias: Any, settings: Any, activation: str, in_place: bool
) -> None:
    scalars = ACTIVATIONS[activation][1]
    if other is None:
        node.target = _CONVOLVE
        node.args = (x, slot, bias, *settings, activation, scalars, "")
        return
    tensors = (other, x) if in_place else (x, other)
    node.target = _ADD_IN_PLACE if in_place else _ADD
    unary = None if activation == "none" else activation
    node.args = (*tensors, slot, bias, *settings, "add", 1.0, unary, scalars, "")


def is_consumable(
    lowered: LoweredModel,
    node: fx.Node,
    operands: Sequence[Any],
    fresh: Sequence[Any],
    order: dict[fx.Node, int],
    values: Mapping[fx.Node, Any],
) -> bool:
    """Whether the sum may overwrite the residual: one of `fresh` made it, and nothing reads it any more.

    What members share is read by the next member, too.
    """
    x, other = operands
    made_here = other.target in fresh and (other in lowered.batched) == (node in lowered.batched)
    last_use = all(order[user] <= order[node] for user in other.users)
    return made_here and last_use and other is not x and values[other].shape == values[node].shape


def _add_packed_slot(lowered: LoweredModel, weight: Any) -> fx.Node:
    """A slot for packed weights beside the plain ones, which another node may still need."""
    return lowered.add_slot(f"{weight.name}_packed", lowered.slots[weight.name], weight.name in lowered.stacked)


def member_slot(lowered: LoweredModel, packed: Mapping[str, list[Any]], name: str, index: int) -> Any:
    """What fills a slot when the member of this index runs alone."""
    if name in packed:
        return packed[name][index if name in lowered.stacked else 0]
    return lowered.row(name, index)
