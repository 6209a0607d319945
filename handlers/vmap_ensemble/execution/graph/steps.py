"""The steps of a lowered graph in plain torch: what every faster kernel must equal.

M members, B batch, C channels. Two forms hold all members in one tensor: side by side in the channels,
(B, M*C, H, W), for steps that look at each channel alone or are grouped, and member-major, (M, B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A linear layer of fewer weights costs more to call oneDNN for than it saves (10x128: 21 us in 8 bits, 4 us plain).
MIN_LINEAR_WEIGHTS = 2**16

# Name as oneDNN knows it -> (plain function, oneDNN's scalars). Only what both compute alike.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "none": (lambda x: x, []),
    "relu": (F.relu, []),
    "hardtanh": (F.relu6, [0.0, 6.0]),
    "swish": (F.silu, []),
    "hardswish": (F.hardswish, []),
}

# Behind linear layers: name -> plain function.
LINEAR_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Sequence[Any], activation: str) -> Tensor:
    """One member's fused step in plain torch: what every faster kernel must equal. (B, C, H, W)."""
    padding, stride, dilation, groups = settings
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation][0](y)


def convolve_add(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, settings: Sequence[Any], activation: str
) -> Tensor:
    """As `convolve`, with the residual added before the activation."""
    return ACTIVATIONS[activation][0](convolve(x, weight, bias, settings, "none") + other)


CONVOLUTIONS = (convolve, convolve_add)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """A linear layer and its activation, one of `LINEAR_ACTIVATIONS`: (..., in) -> (..., out)."""
    return LINEAR_ACTIVATIONS[activation](F.linear(x, weight, bias))


def linear_add(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer and a residual of its result's shape."""
    return F.linear(x, weight, bias) + other


def split_members(x: Tensor, count: int) -> Tensor:
    """(B, M*C, H, W) -> (M, B, C, H, W), a view."""
    return x.unflatten(1, (count, -1)).movedim(1, 0)


def split_flat(x: Tensor, count: int) -> Tensor:
    """(B, M*C, H, W) -> (M, B, C*H*W), channel by channel, as flattening a member's value gives."""
    return split_members(x, count).flatten(2)


def split_flat_last(x: Tensor, count: int) -> Tensor:
    """(B, M*C, H, W) -> (M, B, H*W*C), position by position: the order in which channels_last values lie."""
    return x.movedim(1, -1).unflatten(-1, (count, -1)).movedim(-2, 0).flatten(2)


def repeat_members(x: Tensor, count: int) -> Tensor:
    """What members share, (B, C, H, W), once for each in the channels: (B, M*C, H, W)."""
    return x.repeat(1, count, 1, 1)


def multiply_members(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every member's linear layer: (M, B, in), (M, out, in) and (M, out) -> (M, B, out)."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def pass_members(x: Tensor) -> Tensor:
    """(M, B, ...) as it is: where steps for all members end, and those of each one begin."""
    return x
