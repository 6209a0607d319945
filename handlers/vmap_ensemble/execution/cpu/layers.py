"""Turns layers of a lowered graph into what a kernel is asked about, and its answers into a line for people.

A kernel is one object: why it can't compute a layer, how it packs the weights, which step computes with them. The
packers (pack_convolutions.py, pack_linears.py) have a list each, and take the first without a reason against it;
whoever adds another kernel puts it into that list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from vmap_ensemble.execution.cpu.onednn import Step
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import ConvolveCall, ConvolveSettings, LinearCall


@dataclass(frozen=True)
class ConvolutionLayer:
    """A convolution, with the sum and the activation that belong to it, on the example.

    Attributes:
        dtype: Of the weight.
        shape: The weight's, (groups * filters, channels, height, width).
        settings: Padding, stride, dilation and groups.
        activation: Its name.
        input: The input's shape, (B, groups * channels, H, W).
        output: The output's.
        unequal_sum: Whether what is added to it has another shape or dtype, and is repeated.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    settings: ConvolveSettings
    activation: str
    input: Sequence[int]
    output: Sequence[int]
    unequal_sum: bool = False


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer on the example.

    Attributes:
        dtype: Of the weight.
        shape: The weight's, (out, in), with M in front if it is every member's in one call.
        joined: Whether it is.
        input: The input's shape.
        large: Whether it is worth packed weights (`is_large_linear`).
    """

    dtype: torch.dtype
    shape: Sequence[int]
    joined: bool
    input: Sequence[int]
    large: bool


class ConvolutionKernel(ABC):
    """A way to compute convolutions, one member at a time or members side by side in groups.

    Attributes:
        name: In the description.
        fresh: The functions of its steps whose value nobody else holds, so that a later sum may be written into it.
        halves: Whether `step` can take along the max pooling of 2x2 pixels behind the layer.
    """

    name: ClassVar[str]
    fresh: ClassVar[tuple[object, ...]] = ()
    halves: ClassVar[bool] = False

    @abstractmethod
    def reasons_against(self, layer: ConvolutionLayer) -> list[str]:
        """Why it can't, or should not, compute the layer; empty if it can."""

    @abstractmethod
    def pack(self, layer: ConvolutionLayer, weight: Tensor) -> object:
        """What `step` gets for one member's weight."""

    @abstractmethod
    def step(
        self, layer: ConvolutionLayer, call: ConvolveCall, packed: fx.Node, *, in_place: bool, halved: bool
    ) -> Step:
        """Function and arguments of the step that computes the layer.

        Args:
            layer: The layer.
            call: Its nodes.
            packed: The slot for what `pack` gave.
            in_place: Whether the residual may be overwritten with the result.
            halved: Whether the maxima of 2x2 pixels are wanted; only if `halves`, and then without a residual.
        """


class LinearKernel(ABC):
    """A way to compute linear layers.

    Attributes:
        name: In the description.
        activations: Names of those that it can take along.
    """

    name: ClassVar[str]
    activations: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def reasons_against(self, layer: LinearLayer) -> list[str]:
        """Why it can't, or should not, compute the layer; empty if it can."""

    @abstractmethod
    def pack(self, layer: LinearLayer, weight: Tensor) -> list[Any]:
        """What `step` gets, one per member or one in all, of (M, out, in) or (out, in) weights."""

    @abstractmethod
    def step(self, layer: LinearLayer, call: LinearCall, packed: fx.Node, activation: str) -> Step:
        """Function and arguments of the step that computes the layer, with an activation or `none`."""


@dataclass
class Tally:
    """Which kernel took how many layers, and the first reason against each of the others.

    Attributes:
        taken: Kernel -> number of layers.
        against: Kernel -> reason -> number of layers.
    """

    taken: Counter[str] = field(default_factory=Counter)
    against: dict[str, Counter[str]] = field(default_factory=dict)

    def note(self, name: str, reasons: Sequence[str]) -> bool:
        """Count a kernel's answer for one layer; whether it takes the layer."""
        self.against.setdefault(name, Counter())
        if reasons:
            self.against[name][reasons[0]] += 1
        else:
            self.taken[name] += 1
        return not reasons

    def __str__(self) -> str:
        return ", ".join(self._line(name) for name in self.against)

    def _line(self, name: str) -> str:
        reasons = self.against[name]
        asked = self.taken[name] + reasons.total()
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"{name}: {self.taken[name]} of {asked} layers" + (f" ({counted})" if counted else "")


def add_packed_slot(lowered: LoweredModel, weight: fx.Node) -> fx.Node:
    """A slot for packed weights beside the plain ones, which another node may still need."""
    return lowered.add_slot(f"{weight.name}_packed", lowered.slots[weight.name], weight.name in lowered.stacked)


def write_step(node: fx.Node, step: Step) -> None:
    """Let the node call this."""
    node.op, node.kwargs = "call_function", {}
    node.target, node.args = step
