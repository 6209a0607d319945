"""Turns nodes of a lowered graph into what they are: a convolution, a linear layer, a pooling, an activation.

Every pass asks here, so that a way to write a step is known to all of them or to none.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.steps import CONVOLUTIONS, convolve, convolve_add, multiply_members

_ACTIVATION_OF_MODULE: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "hardtanh",
    nn.SiLU: "swish",
    nn.Hardswish: "hardswish",
}
_ACTIVATION_OF_FUNCTION: dict[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "hardtanh",
    F.silu: "swish",
    F.hardswish: "hardswish",
}
_ADDITIONS: set[object] = {operator.add, operator.iadd, torch.add}
_MAX_POOLS: set[object] = {F.max_pool2d, torch.max_pool2d}
_RESHAPING_METHODS = {"flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze"}
_RESHAPING: set[object] = {torch.flatten, torch.reshape, torch.permute, torch.transpose}
Sides = tuple[int, int]


class ConvolveSettings(NamedTuple):
    """How a convolution moves over its input; the lists have one number per side."""

    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int


@dataclass(frozen=True)
class ConvolveCall:
    """A step `convolve` or `convolve_add`.

    Attributes:
        x: The node that gives its input.
        other: The residual, if one is added.
        weight: The slot.
        bias: The slot, if there is one.
        settings: Padding, stride, dilation and groups.
        activation: Its name.
    """

    x: fx.Node
    other: fx.Node | None
    weight: fx.Node
    bias: fx.Node | None
    settings: ConvolveSettings
    activation: str

    @classmethod
    def of(cls, node: fx.Node) -> ConvolveCall | None:
        """What the node calls; None if it is another step."""
        args: Any = node.args
        if node.target is convolve:
            x, weight, bias, settings, activation = args
            return cls(x, None, weight, bias, ConvolveSettings(*settings), activation)
        if node.target is convolve_add:
            x, other, weight, bias, settings, activation = args
            return cls(x, other, weight, bias, ConvolveSettings(*settings), activation)
        return None

    def write(self, node: fx.Node) -> None:
        """Let the node call this."""
        residual = () if self.other is None else (self.other,)
        node.op, node.kwargs = "call_function", {}
        node.target = convolve if self.other is None else convolve_add
        node.args = (self.x, *residual, self.weight, self.bias, [*self.settings], self.activation)


@dataclass(frozen=True)
class LinearCall:
    """A plain linear layer whose weight is a slot: one member's, or `multiply_members` of all.

    Attributes:
        x: The node that gives its input.
        weight: The slot.
        bias: What is added, if anything.
        joined: Whether it is every member's in one call.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    joined: bool

    @classmethod
    def of(cls, node: fx.Node, lowered: LoweredModel) -> LinearCall | None:
        """What the node calls; None if it is another step, or its weight is worked out and no slot."""
        if node.target not in (F.linear, multiply_members) or node.kwargs or len(node.args) != 3:
            return None
        x, weight, bias = cast("tuple[fx.Node, fx.Node, fx.Node | None]", node.args)
        if not isinstance(weight, fx.Node) or weight.name not in lowered.slots:
            return None
        return cls(x, weight, bias, node.target is multiply_members)

    def has_plain_bias(self, lowered: LoweredModel) -> bool:
        """Whether the bias is a slot, too, or there is none."""
        return self.bias is None or (isinstance(self.bias, fx.Node) and self.bias.name in lowered.slots)


class MaxPool(NamedTuple):
    """Max pooling that gives no indices; sizes are one number or one per side."""

    kernel: int | Sides
    stride: int | Sides
    padding: int | Sides
    dilation: int | Sides
    ceil_mode: bool

    @classmethod
    def of(cls, node: fx.Node, root: nn.Module) -> MaxPool | None:
        """What the node pools with; None if it is another step.

        Args:
            node: The node.
            root: Owner of the modules that the graph calls by name.
        """
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        module = module_of(node, root)
        given: dict[str, Any]
        if isinstance(module, nn.MaxPool2d):
            given = {name: getattr(module, name) for name in names}
        elif node.op == "call_function" and node.target in _MAX_POOLS and node.args:
            given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        else:
            return None
        kernel, stride = given["kernel_size"], given.get("stride")
        if given.get("return_indices", False):
            return None
        stride = kernel if stride is None else stride
        return cls(kernel, stride, given.get("padding", 0), given.get("dilation", 1), given.get("ceil_mode", False))


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that the node calls, if it calls one."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def output_node(graph: fx.Graph) -> fx.Node:
    """The node whose first argument is what the model returns."""
    (output,) = graph.find_nodes(op="output")
    return output


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that takes this one's value, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def count_convolutions(nodes: list[fx.Node]) -> int:
    """How many of the nodes are 2-d convolutions."""
    return sum(node.target in CONVOLUTIONS for node in nodes)


def activation_name(node: fx.Node, root: nn.Module) -> str | None:
    """The activation that a node is, as `ACTIVATIONS` calls it."""
    if node.op == "call_function":
        return _ACTIVATION_OF_FUNCTION.get(node.target)
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu"
    module = module_of(node, root)
    return None if module is None else _ACTIVATION_OF_MODULE.get(type(module))


def is_addition(node: fx.Node) -> bool:
    """Whether the node is a sum."""
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in _ADDITIONS


def flattens_examples(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node is x.flatten(1)."""
    module = module_of(node, root)
    if module is not None:
        return isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1
    if node.target not in (torch.flatten, "flatten") or len(node.args) > 2 or set(node.kwargs) - {"start_dim"}:
        return False
    return bool((node.args[1] if len(node.args) == 2 else node.kwargs.get("start_dim", 0)) == 1)


def only_reshapes(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node leaves all numbers as they are, and only orders them otherwise."""
    if node.op == "call_method":
        return node.target in _RESHAPING_METHODS
    module = module_of(node, root)
    return isinstance(module, nn.Flatten) if module is not None else node.target in _RESHAPING


def pools_to_means(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node is a module that averages each channel."""
    module = module_of(node, root)
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
