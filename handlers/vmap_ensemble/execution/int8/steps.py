"""Turns tensors into 8-bit numbers and back, and computes layers on them in plain torch.

    x ~ scale * (q - zero_point)          activations, q in 0..255, one scale per tensor, from calibration
    w ~ scale[o] * q                      weights, q in -127..127 (or -63..63), one scale per output channel o

These steps are the reference that the kernels of kernels.py must equal.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, https://arxiv.org/abs/1712.05877
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmap_ensemble.execution.cpu.onednn import products_saturate
from vmap_ensemble.execution.graph.steps import convolve, convolve_add

LEVELS, WEIGHT_LEVELS = 255, 127
# Of weights where products saturate: 2 * 255 * 63 fits into the 16 bits that pairs of them are summed in.
FEWER_WEIGHT_LEVELS = 63


@dataclass(frozen=True)
class Scale:
    """How a tensor's 8-bit numbers are read: scale * (q - zero_point)."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Layer:
    """One member's convolution or linear layer in 8 bits.

    Attributes:
        weight: (O, I, ...) int8; packed for oneDNN in the kernels' layers.
        weight_scale: (O,) float32.
        bias: (O,) float32 or None; batch norm is folded into it.
        input: Of the activations it reads.
        output: Of the result; None where that is float32.
        other: Of the residual that is added, if any.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input: Scale
    output: Scale | None = None
    other: Scale | None = None

    def float_weight(self) -> Tensor:
        """(O, I, ...) float32: the weights that the 8 bits stand for."""
        shape = (-1, *(1 for _ in self.weight.shape[1:]))
        return self.weight.float() * self.weight_scale.reshape(shape)


def scale_of_range(low: float, high: float) -> Scale:
    """The scale that spreads 0..255 over a range; 0 is always a number of its own, since padding writes zeros."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS
    if scale < torch.finfo(torch.float32).tiny:  # a value that is always 0
        return Scale(1.0, 0)
    return Scale(scale, round(-low / scale))


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I, ...) float32 -> the nearest int8 and (O,) scales, symmetric per output channel.

    In -127..127; in -63..63 on a CPU whose 8-bit products saturate, where larger ones would give wrong sums.
    """
    levels = FEWER_WEIGHT_LEVELS if products_saturate() else WEIGHT_LEVELS
    largest = weight.detach().flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / levels, 1.0)
    rows = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return (weight / rows).round().clamp(-levels, levels).to(torch.int8), scale


def quantise(x: Tensor, scale: Scale) -> Tensor:
    """Float32 -> uint8, nearest; what lies beyond the calibrated range becomes its end."""
    return torch.quantize_per_tensor(x, scale.scale, scale.zero_point, torch.quint8).int_repr()


def dequantise(q: Tensor, scale: Scale) -> Tensor:
    """Uint8 -> float32."""
    x = q.float()
    if scale.zero_point:
        x -= scale.zero_point
    return x.mul_(scale.scale)


def convolve_u8(x: Tensor, layer: Layer, settings: list[Any], activation: str) -> Tensor:
    """A fused convolution (B, C, H, W) uint8 -> uint8."""
    y = convolve(dequantise(x, layer.input), layer.float_weight(), layer.bias, settings, activation)
    return quantise(y, known_scale(layer.output))


def convolve_add_u8(x: Tensor, other: Tensor, layer: Layer, settings: list[Any], activation: str) -> Tensor:
    """As `convolve_u8`, with an 8-bit residual added before the activation."""
    residual = dequantise(other, known_scale(layer.other))
    y = convolve_add(dequantise(x, layer.input), residual, layer.float_weight(), layer.bias, settings, activation)
    return quantise(y, known_scale(layer.output))


def linear_u8(x: Tensor, layer: Layer) -> Tensor:
    """A linear layer (B, I) uint8 -> (B, O) float32."""
    return F.linear(dequantise(x, layer.input), layer.float_weight(), layer.bias)


def max_pool_u8(x: Tensor, settings: list[Any]) -> Tensor:
    """Max pooling (B, C, H, W) uint8 -> uint8; the scale stays."""
    return F.max_pool2d(x.float(), *settings).to(torch.uint8)


def known_scale(scale: Scale | None) -> Scale:
    """The scale of a step that must have one."""
    if scale is None:
        raise ValueError("this step needs the scale of its result; build it with quantise_graph")
    return scale
