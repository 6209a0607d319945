"""Turns the plain convolutions and large linear layers of a lowered graph into faster ones on weights packed once.

3x3 convolutions become Winograd's products where that pays (winograd.py), the others and linear layers oneDNN's.

oneDNN's convolution wants its weights in blocks that suit the CPU, and reorders plain ones on every call.
Packed for the example's size they stay right for every other size: oneDNN reorders them where it must.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, cast

import torch
from torch import fx

from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.cpu.onednn import _ADD, _ADD_IN_PLACE, _CONVOLVE
from vmap_ensemble.execution.cpu.pooling import halve
from vmap_ensemble.execution.cpu.winograd import WinogradWeights, choose_tile, convolve_tiles
from vmap_ensemble.execution.graph.fusing import swallow
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import ConvolveCall, only_user
from vmap_ensemble.execution.graph.steps import (
    ACTIVATIONS,
    convolve,
)
from vmap_ensemble.execution.graph.values import is_consumable

_FRESH = (_CONVOLVE, _ADD, _ADD_IN_PLACE, convolve_tiles, halve)  # what they give is nobody else's


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
            call = ConvolveCall.of(node)
            if call is None:
                continue
            x, other, weight, bias = call.x, call.other, call.weight, call.bias
            settings, activation = call.settings, call.activation
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


def _swallow_halving(node: fx.Node, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> bool:
    """Whether max pooling of 2x2 pixels is all that takes the node's value; it becomes part of the node."""
    user = only_user(node)
    if swallow(node, lambda user: "halve" if user.target is halve and user.args[1] == 2 else None, nodes) is None:
        return False
    values[node] = values[cast(fx.Node, user)]
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


def _add_packed_slot(lowered: LoweredModel, weight: Any) -> fx.Node:
    """A slot for packed weights beside the plain ones, which another node may still need."""
    return lowered.add_slot(f"{weight.name}_packed", lowered.slots[weight.name], weight.name in lowered.stacked)
