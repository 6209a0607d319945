"""Turns the plain convolutions of a lowered graph into faster ones on weights packed once.

3x3 convolutions become Winograd's products where that pays (winograd.py), the others oneDNN's.

oneDNN's convolution wants its weights in blocks that suit the CPU, and reorders plain ones on every call.
Packed for the example's size they stay right for every other size: oneDNN reorders them where it must.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.layers import (
    ConvolutionKernel,
    ConvolutionLayer,
    Tally,
    add_packed_slot,
    write_step,
)
from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.cpu.onednn import (
    CONVOLVE,
    CONVOLVE_ADD,
    CONVOLVE_ADD_IN_PLACE,
    Step,
    convolve_add_step,
    convolve_step,
    prepack_convolution,
)
from vmap_ensemble.execution.cpu.pooling import halve
from vmap_ensemble.execution.cpu.winograd import Winograd
from vmap_ensemble.execution.graph.fusing import swallow
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import ConvolveCall, only_user
from vmap_ensemble.execution.graph.steps import convolve
from vmap_ensemble.execution.graph.values import is_consumable


class OneDnnConvolution(ConvolutionKernel):
    """oneDNN's convolution on reordered weights."""

    name = "onednn"
    fresh = (CONVOLVE, CONVOLVE_ADD, CONVOLVE_ADD_IN_PLACE)

    def reasons_against(self, layer: ConvolutionLayer) -> list[str]:
        """Only a sum of unequal shapes: the plain step alone knows how to repeat what is added, or the value."""
        return ["unequal sum"] if layer.unequal_sum else []

    def pack(self, layer: ConvolutionLayer, weight: Tensor) -> Tensor:
        return prepack_convolution(weight, layer.settings, layer.input)

    def step(
        self, layer: ConvolutionLayer, call: ConvolveCall, packed: fx.Node, *, in_place: bool, halved: bool
    ) -> Step:
        if call.other is None:
            return convolve_step(call.x, packed, call.bias, call.settings, call.activation)
        return convolve_add_step(
            call.x, call.other, packed, call.bias, call.settings, call.activation, in_place=in_place
        )


# Asked in this order. Another kernel is put where it belongs: CONVOLUTION_KERNELS.insert(0, Mine()).
CONVOLUTION_KERNELS: list[ConvolutionKernel] = [Winograd(), OneDnnConvolution()]


def pack_convolutions(
    lowered: LoweredModel, nodes: list[fx.Node], values: dict[fx.Node, Any]
) -> tuple[dict[str, list[Any]], Tally]:
    """Replace plain convolutions by faster ones on packed weights, in place.

    Args:
        lowered: The graph; each convolution gets a new slot, for packed weights.
        nodes: Those of the graph to look at.
        values: An example of every node's value.

    Returns:
        Slot name -> packed weights, one per member, or one in all if members share them; and who took what.
    """
    packed: dict[str, list[Any]] = {}
    tally = Tally()
    order = {node: position for position, node in enumerate(lowered.graph.nodes)}
    with closing(MemberThreads(torch.get_num_threads() if nodes else 1)) as threads:
        for node in list(nodes):
            call = ConvolveCall.of(node)
            if call is None:
                continue
            layer = describe_layer(lowered, call, values)
            kernel = next((k for k in CONVOLUTION_KERNELS if tally.note(k.name, k.reasons_against(layer))), None)
            if kernel is None:
                continue
            slot = add_packed_slot(lowered, call.weight)
            packed[slot.name] = _pack_weight(lowered, kernel, layer, call.weight, threads)
            in_place = _may_overwrite(lowered, node, call, order, values)
            halved = kernel.halves and call.other is None and _swallow_halving(node, nodes, values)
            write_step(node, kernel.step(layer, call, slot, in_place=in_place, halved=halved))
            if not call.weight.users:
                # What was copied to be packed is given back at once: it never lies beside all of the packed ones.
                lowered.slots[slot.name] = lowered.slots[call.weight.name] = torch.empty(0)
                values.pop(call.weight, None)
    return packed, tally


def describe_layer(lowered: LoweredModel, call: ConvolveCall, values: dict[fx.Node, Any]) -> ConvolutionLayer:
    """What kernels are asked about, from the example's values."""
    plain = lowered.slots[call.weight.name]
    shape = plain.shape[1:] if call.weight.name in lowered.stacked else plain.shape
    unfilled = torch.empty(shape, dtype=plain.dtype, device="meta")
    x = values[call.x]
    output = convolve(x.to("meta"), unfilled, None, call.settings, "none").shape
    other = None if call.other is None else values[call.other]
    unequal = other is not None and (other.shape != output or other.dtype != plain.dtype)
    return ConvolutionLayer(plain.dtype, shape, call.settings, call.activation, x.shape, output, unequal)


def _may_overwrite(
    lowered: LoweredModel,
    node: fx.Node,
    call: ConvolveCall,
    order: dict[fx.Node, int],
    values: dict[fx.Node, Any],
) -> bool:
    if call.other is None:
        return False
    fresh = [halve, *(function for kernel in CONVOLUTION_KERNELS for function in kernel.fresh)]
    return is_consumable(lowered, node, (call.x, call.other), fresh, order, values)


def _swallow_halving(node: fx.Node, nodes: list[fx.Node], values: dict[fx.Node, Any]) -> bool:
    """Whether max pooling of 2x2 pixels is all that takes the node's value; it becomes part of the node."""
    user = only_user(node)
    if swallow(node, lambda user: "halve" if user.target is halve and user.args[1] == 2 else None, nodes) is None:
        return False
    values[node] = values[cast(fx.Node, user)]
    return True


def _pack_weight(
    lowered: LoweredModel, kernel: ConvolutionKernel, layer: ConvolutionLayer, weight: fx.Node, threads: MemberThreads
) -> list[object]:
    count = len(lowered.slots[weight.name]) if weight.name in lowered.stacked else 1
    return threads.map(lambda index: kernel.pack(layer, lowered.row(weight.name, index)), range(count))
