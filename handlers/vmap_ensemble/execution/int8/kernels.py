"""Turns the 8-bit steps of a quantised graph into oneDNN's integer kernels, on weights packed once.

oneDNN multiplies uint8 by int8 into int32 (VNNI instructions), and scales, adds and clips in the same kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.onednn import (
    QUANTISED_CONVOLVE,
    QUANTISED_CONVOLVE_ADD,
    QUANTISED_LINEAR,
    max_pool_quantised,
    prepack_quantised_convolution,
    prepack_quantised_linear,
)
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import ConvolveSettings
from vmap_ensemble.execution.graph.steps import ACTIVATIONS
from vmap_ensemble.execution.graph.values import is_consumable
from vmap_ensemble.execution.int8.steps import (
    Layer,
    convolve_add_u8,
    convolve_u8,
    known_scale,
    linear_u8,
    max_pool_u8,
)


@dataclasses.dataclass(frozen=True)
class PackedLayer(Layer):
    """A layer as oneDNN's operators take it: packed weights, and the weights' zero points (all 0)."""

    weight_zero: Tensor = dataclasses.field(kw_only=True)


def _convolve(x: Tensor, layer: PackedLayer, settings: list[Any], activation: str) -> Tensor:
    padding, stride, dilation, groups = settings
    out = known_scale(layer.output)
    return QUANTISED_CONVOLVE(
        x,
        layer.input.scale,
        layer.input.zero_point,
        layer.weight,
        layer.weight_scale,
        layer.weight_zero,
        layer.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        output_scale=out.scale,
        output_zero_point=out.zero_point,
        output_dtype=torch.uint8,
        attr=activation,
        scalars=ACTIVATIONS[activation][1],
        algorithm="",
    )


def _convolve_add_in_place(
    x: Tensor, other: Tensor, layer: PackedLayer, settings: list[Any], activation: str
) -> Tensor:
    padding, stride, dilation, groups = settings
    out, residual = known_scale(layer.output), known_scale(layer.other)
    return QUANTISED_CONVOLVE_ADD(
        x,
        layer.input.scale,
        layer.input.zero_point,
        layer.weight,
        layer.weight_scale,
        layer.weight_zero,
        other,
        layer.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        output_scale=out.scale,
        output_zero_point=out.zero_point,
        output_dtype=torch.uint8,
        accum_scale=residual.scale,
        accum_zero_point=residual.zero_point,
        binary_attr="sum",
        alpha=1.0,
        unary_attr=activation,
        unary_scalars=ACTIVATIONS[activation][1],
        unary_algorithm="",
    )


def _convolve_add(x: Tensor, other: Tensor, layer: PackedLayer, settings: list[Any], activation: str) -> Tensor:
    # The kernel sums into the residual, which somebody still needs.
    return _convolve_add_in_place(x, other.clone(), layer, settings, activation)


def _linear(x: Tensor, layer: PackedLayer) -> Tensor:
    return QUANTISED_LINEAR(
        x,
        layer.input.scale,
        layer.input.zero_point,
        layer.weight,
        layer.weight_scale,
        layer.weight_zero,
        layer.bias,
        output_scale=1.0,
        output_zero_point=0,
        output_dtype=torch.float32,
        post_op_name="none",
        post_op_args=[],
        post_op_algorithm="",
    )


def _max_pool(x: Tensor, settings: list[Any]) -> Tensor:
    return max_pool_quantised(x, *settings)


_KERNELS: dict[Any, Callable[..., Any]] = {
    convolve_u8: _convolve,
    convolve_add_u8: _convolve_add,
    linear_u8: _linear,
    max_pool_u8: _max_pool,
}
_FRESH = (_convolve, _convolve_add, _convolve_add_in_place, _max_pool)  # write memory of their own


def pack_quantised(
    lowered: LoweredModel, nodes: list[fx.Node], values: Mapping[fx.Node, Any], filled: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """Replace the plain 8-bit steps by oneDNN's, in place.

    Args:
        lowered: The quantised graph.
        nodes: Those of the graph to look at.
        values: An example of every node's value.
        filled: What `quantise_graph` returned; stays as it is.

    Returns:
        As `filled`, with packed layers.
    """
    packed = dict(filled)
    order = {node: position for position, node in enumerate(lowered.graph.nodes)}
    for node in nodes:
        step: Any = node.target
        args: Any = node.args
        if step is max_pool_u8:
            *sizes, ceil_mode = args[1]
            node.args = (args[0], [*(_pair(size) for size in sizes), ceil_mode])
        elif step in _KERNELS:
            slot = args[2 if step is convolve_add_u8 else 1].name
            settings = None if step is linear_u8 else args[-2]
            shape = list(values[args[0]].shape)
            packed[slot] = [_pack_layer(layer, settings, shape) for layer in filled[slot]]
        else:
            continue
        in_place = step is convolve_add_u8 and is_consumable(lowered, node, args[:2], _FRESH, order, values)
        node.target = _convolve_add_in_place if in_place else _KERNELS[step]
    return packed


def _pack_layer(layer: Layer, settings: Any, shape: list[int]) -> PackedLayer:
    if settings is None:
        weight = prepack_quantised_linear(layer.weight, shape)
    else:
        weight = prepack_quantised_convolution(
            layer.weight,
            layer.weight_scale,
            x_scale=layer.input.scale,
            x_zero=layer.input.zero_point,
            settings=ConvolveSettings(*settings),
            input_size=shape,
        )
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(Layer)}
    zero = torch.zeros(len(layer.weight_scale), dtype=torch.int32)
    return PackedLayer(**{**fields, "weight": weight, "weight_zero": zero})


def _pair(size: Any) -> list[int]:
    return list(size) if isinstance(size, tuple | list) else [size, size]
