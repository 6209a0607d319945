"""Turns layers into calls of oneDNN: each of PyTorch's private operators for it is named here and nowhere else.

A step of a graph is an operator and its arguments, not a function around it, whose call would be paid for at every
layer of every member. The arguments are NamedTuples in the order of the operators' schemas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.graph.patterns import ConvolveSettings
from vmap_ensemble.execution.graph.steps import ACTIVATIONS
from vmap_ensemble.process.device import has_float16_kernels

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers

CONVOLVE = torch.ops.mkldnn._convolution_pointwise.default
CONVOLVE_ADD = torch.ops.mkldnn._convolution_pointwise.binary
CONVOLVE_ADD_IN_PLACE = torch.ops.mkldnn._convolution_pointwise_.binary
LINEAR = torch.ops.mkldnn._linear_pointwise.default
LINEAR_ADD = torch.ops.mkldnn._linear_pointwise.binary
QUANTISED_CONVOLVE = torch.ops.onednn.qconv_pointwise
QUANTISED_CONVOLVE_ADD = torch.ops.onednn.qconv2d_pointwise.binary
QUANTISED_LINEAR = torch.ops.onednn.qlinear_pointwise
# Order for products of about so many rows: for one as well (9216 to 128 on one core, 0.14 ms against 0.20 ms packed
# for one row, and 0.18 ms plain; 8 rows 0.21 ms against 0.51 ms plain).
PACKED_FOR_ROWS = 16
# Name of a linear layer's activation -> oneDNN's name and algorithm.
_LINEAR_ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}

Step = tuple[Callable[..., Any], tuple[Any, ...]]
Slot = fx.Node | None


class ConvolveArguments(NamedTuple):
    """Of `CONVOLVE`."""

    x: fx.Node
    weight: fx.Node
    bias: Slot
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int
    attr: str
    scalars: list[float]
    algorithm: str


class ConvolveAddArguments(NamedTuple):
    """Of `CONVOLVE_ADD`; `CONVOLVE_ADD_IN_PLACE` wants the residual before the input."""

    x: fx.Node
    other: fx.Node
    weight: fx.Node
    bias: Slot
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int
    binary_attr: str
    alpha: float
    unary_attr: str | None
    unary_scalars: list[float]
    unary_algorithm: str


class LinearArguments(NamedTuple):
    """Of `LINEAR`."""

    x: Any
    weight: Any
    bias: Any
    attr: str
    scalars: list[float]
    algorithm: str


class LinearAddArguments(NamedTuple):
    """Of `LINEAR_ADD`."""

    x: fx.Node
    other: fx.Node
    weight: fx.Node
    bias: Slot
    attr: str


def reasons_against_dtypes(members: StackedMembers) -> list[str]:
    """Why members can't be computed fast in their dtypes: oneDNN would convert at every step. Empty if they can."""
    fast = {torch.float32, torch.float16, torch.bfloat16}
    if members.device.type == "cpu":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            fast.discard(torch.bfloat16)
        if not has_float16_kernels():
            fast.discard(torch.float16)
    found = {str(tensor.dtype) for tensor in members.tensors() if tensor.is_floating_point()}
    wrong = sorted(found - set(map(str, fast)))
    if not wrong:
        return []
    return [
        f"this device has no fast convolution of {', '.join(wrong)}, only of "
        f"{', '.join(sorted(map(str, fast)))}; use one of these, or eager or compiled"
    ]


def convolve_step(x: fx.Node, weight: fx.Node, bias: Slot, settings: ConvolveSettings, activation: str) -> Step:
    """A convolution on reordered weights."""
    scalars = ACTIVATIONS[activation][1]
    arguments = ConvolveArguments(x, weight, bias, *settings, attr=activation, scalars=scalars, algorithm="")
    return CONVOLVE, tuple(arguments)


def convolve_add_step(
    x: fx.Node,
    other: fx.Node,
    weight: fx.Node,
    bias: Slot,
    settings: ConvolveSettings,
    activation: str,
    *,
    in_place: bool,
) -> Step:
    """As `convolve_step`, with the residual added before the activation; in place it is overwritten."""
    arguments = ConvolveAddArguments(
        *(x, other, weight, bias),
        *settings,
        binary_attr="add",
        alpha=1.0,
        unary_attr=None if activation == "none" else activation,
        unary_scalars=ACTIVATIONS[activation][1],
        unary_algorithm="",
    )
    if in_place:
        return CONVOLVE_ADD_IN_PLACE, (other, x, *arguments[2:])
    return CONVOLVE_ADD, tuple(arguments)


def linear_step(x: fx.Node, weight: fx.Node, bias: Slot, activation: str) -> Step:
    """A linear layer on reordered weights."""
    attr, algorithm = _LINEAR_ACTIVATIONS[activation]
    return LINEAR, tuple(LinearArguments(x, weight, bias, attr, scalars=[], algorithm=algorithm))


def linear_add_step(x: fx.Node, other: fx.Node, weight: fx.Node, bias: Slot) -> Step:
    """A linear layer on reordered weights, with a residual of its result's shape."""
    return LINEAR_ADD, tuple(LinearAddArguments(x, other, weight, bias, attr="add"))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """(..., in) by a reordered matrix -> (..., out), now."""
    attr, algorithm = _LINEAR_ACTIVATIONS[activation]
    return LINEAR(*LinearArguments(x, weight, bias, attr, scalars=[], algorithm=algorithm))


def can_prepack(tensor: Tensor) -> bool:
    """Whether oneDNN can reorder these matrices: (M, out, in) or (out, in), float32, on a CPU that has it."""
    return (
        tensor.ndim in (2, 3)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    )


def prepack(weight: Tensor) -> list[Tensor]:
    """(M, out, in) -> M matrices in the order of oneDNN's product with few rows; one for (out, in)."""
    rows = weight.unbind() if weight.ndim == 3 else (weight,)
    return [torch.ops.mkldnn._reorder_linear_weight(row.contiguous(), PACKED_FOR_ROWS) for row in rows]


@functools.cache
def products_saturate() -> bool:
    """Whether this CPU's products of uint8 by int8 lose large sums.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits (vpmaddubsw), which end at 32,767: two products
    of 255 by 127 are 64,770.
    """
    x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [1, 64])
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    arguments: tuple[Any, ...] = (x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return not torch.equal(torch.ops.onednn.qlinear_pointwise(*arguments), torch.full((1, 16), 255.0 * 127 * 64))


def prepack_convolution(weight: Tensor, settings: ConvolveSettings, input_size: Sequence[int]) -> Tensor:
    """(out, in / groups, kh, kw) -> blocks that suit this CPU for inputs of this size, and are right for any."""
    padding, stride, dilation, groups = settings
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), padding, stride, dilation, groups, list(input_size)
    )


def prepack_quantised_convolution(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    x_scale: float,
    x_zero: int,
    settings: ConvolveSettings,
    input_size: list[int],
) -> Tensor:
    """Int8 weights, for inputs of this scale."""
    padding, stride, dilation, groups = settings
    return torch.ops.onednn.qconv_prepack(
        weight, weight_scale, x_scale, x_zero, stride, padding, dilation, groups, input_size
    )


def prepack_quantised_linear(weight: Tensor, input_size: list[int]) -> Tensor:
    """Int8 weights (out, in)."""
    return torch.ops.onednn.qlinear_prepack(weight, input_size)


def max_pool_quantised(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
    """Max pooling of 8-bit numbers; torch's own max_pool2d counts with their type, and 255 is too small for that."""
    return torch.ops.quantized.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
