"""Turns a lowered graph into one whose members lie side by side in the channels: a batching rule, applied at load.

    convolve(x, w[m], b[m]) for every m    becomes    convolve(x, cat(w), cat(b)) in M groups
    a member's value (B, C, H, W)          becomes    (B, M*C, H, W), member by member in the channels

A grouped convolution of plain tensors is slower than the loop on a CPU. On channels_last tensors and weights that
are packed once it is faster: one call shares all members' work among the cores, where M calls would each share a
layer of one image. Pooling and activations don't look across channels, and need no change; linear layers become
batched products.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vmap_ensemble.execution.graph.lowered_model import (
    LoweredModel,
    UnsupportedModel,
    drop_unused_slots,
    mark_batched,
)
from vmap_ensemble.execution.graph.patterns import (
    ConvolveCall,
    LinearCall,
    MaxPool,
    flattens_examples,
    module_of,
)
from vmap_ensemble.execution.graph.steps import (
    ACTIVATIONS,
    CONVOLUTIONS,
    multiply_members,
    pass_members,
    repeat_members,
    split_flat,
    split_flat_last,
    split_members,
)

_MEANS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_MEAN_FUNCTIONS: set[Any] = {F.avg_pool2d, F.adaptive_avg_pool2d}
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.GELU,
    nn.LeakyReLU,
    nn.Tanh,
)
_FUNCTIONS: set[Any] = {
    F.hardsigmoid,
    F.gelu,
    F.leaky_relu,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    *(plain for name, (plain, _) in ACTIVATIONS.items() if name != "none"),
}
_BINARY: set[Any] = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul}
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_"}


def join_members(lowered: LoweredModel, count: int, values: Mapping[fx.Node, Any]) -> None:
    """Compute the members in one call of each step, up to where a step isn't known here, in place.

    Args:
        lowered: The graph of one member. Afterwards the joined nodes aren't `batched`; where one of them is used
            by others, a node in `lowered.joined` hands its value on as (M, B, ...).
        count: M.
        values: An example of every node's value in one member.

    Raises:
        UnsupportedModel: A convolution that differs between members can't be joined.
    """
    _Joining(lowered, count, values).run()


class _Joining:
    """One pass over a lowered graph; a value is `joint` (channels), then `major` (M, B, ...), then each member's."""

    def __init__(self, lowered: LoweredModel, count: int, values: Mapping[fx.Node, Any]) -> None:
        self.lowered, self.graph, self.count, self.values = lowered, lowered.graph, count, values
        self.joint: dict[fx.Node, None] = {}  # in the graph's order
        self.major: dict[fx.Node, None] = {}
        self.joined_slots: set[str] = set()

    def run(self) -> None:
        for node in self.lowered.nodes():
            if node not in self.lowered.batched:
                continue
            if node.target in CONVOLUTIONS:
                self._join_convolution(node)
            elif flattens_examples(node, self.lowered.root) and node.args[0] in self.joint:
                self._flatten(node)
            elif self._is_linear(node) and node.args[0] in self.major:
                self._join_linear(node)
            elif _softmax_dim(node) in (1, -1) and node.args[0] in self.major:
                node.args, node.kwargs = node.args[:1], {**node.kwargs, "dim": -1}
                self.major[node] = None
            else:
                self._join_elementwise(node)
        self._hand_over()
        drop_unused_slots(self.lowered)
        self.lowered.batched = set(self.lowered.joined)
        mark_batched(self.lowered)
        self.graph.lint()

    def _join_convolution(self, node: fx.Node) -> None:
        call = ConvolveCall.of(node)
        if call is None:
            raise TypeError(f"'{node}': expected a convolution, got {node.target}")
        weight, groups, own_input = call.weight, call.settings.groups, call.x in self.joint
        if self.values[node].dim() != 4:
            raise UnsupportedModel(f"'{node}' can't be joined: its value is {self.values[node].dim()}-d, not a batch")
        if not own_input and (call.x in self.lowered.batched or groups != 1):
            raise UnsupportedModel(f"'{node}' can't be joined: its input is neither joined nor shared")
        if weight.name not in self.lowered.stacked:
            raise UnsupportedModel(f"'{node}' can't be joined: members share its weights and not its input")
        if call.other is not None and self.lowered.slots[weight.name].dtype != torch.float32:
            raise UnsupportedModel(f"'{node}' can't be joined: a sum in groups is had in float32 alone")
        dataclasses.replace(
            call,
            other=None if call.other is None else self._other(node, call.other),
            weight=self._rows(weight),
            bias=None if call.bias is None else self._rows(call.bias),
            settings=call.settings._replace(groups=groups * self.count if own_input else 1),
        ).write(node)
        self.joint[node] = None

    def _other(self, node: fx.Node, other: fx.Node) -> fx.Node:
        """The residual of a joined convolution."""
        if other in self.joint:
            return other
        if other in self.lowered.batched:
            raise UnsupportedModel(f"'{node}' can't be joined: what is added to it is not")
        with self.graph.inserting_before(node):
            return self.graph.call_function(repeat_members, (other, self.count))

    def _rows(self, slot: fx.Node) -> fx.Node:
        """A slot for all members' rows one below the other: (M, C, ...) -> (M*C, ...)."""
        return self._new_slot(slot, self._every_member(slot).flatten(0, 1))

    def _every_member(self, slot: fx.Node) -> Tensor:
        tensor = self.lowered.value(slot.name)  # one that members share goes with others that they don't
        return tensor if slot.name in self.lowered.stacked else tensor.expand(self.count, *tensor.shape)

    def _new_slot(self, slot: fx.Node, tensor: Tensor) -> fx.Node:
        joined = self.lowered.add_slot(f"{slot.name}_joined", tensor, stacked=False)
        self.joined_slots.add(joined.name)
        return joined

    def _flatten(self, node: fx.Node) -> None:
        """Leave the channels: in the order in which values lie, if the linear layers behind can take that."""
        _, channels, *sides = self.values[cast(fx.Node, node.args[0])].shape
        linears = all(self._is_linear(user) for user in node.users)
        last = linears and math.prod(sides) > 1
        if last:
            for user in list(node.users):
                weight = cast(fx.Node, user.args[1])
                columns = self._every_member(weight).unflatten(-1, (channels, -1))
                user.update_arg(1, self._new_slot(weight, columns.mT.flatten(2)))
        node.op, node.target = "call_function", split_flat_last if last else split_flat
        node.args, node.kwargs = (node.args[0], self.count), {}
        self.major[node] = None

    def _is_linear(self, node: fx.Node) -> bool:
        """Whether the node is a linear layer of slots."""
        call = LinearCall.of(node, self.lowered)
        return call is not None and not call.joined and call.has_plain_bias(self.lowered)

    def _join_linear(self, node: fx.Node) -> None:
        x, weight, bias = cast(Any, node.args)
        own = any(slot.name in self.lowered.stacked for slot in (weight, bias) if slot is not None)
        if own or weight.name in self.joined_slots:
            if weight.name not in self.joined_slots:
                weight = self._new_slot(weight, self._every_member(weight))
            node.target = multiply_members
            node.args = (x, weight, None if bias is None else self._new_slot(bias, self._every_member(bias)))
        self.major[node] = None

    def _join_elementwise(self, node: fx.Node) -> None:
        """Steps that look at each channel, or each element, alone take the joined value as it is."""
        parents = [parent for parent in node.all_input_nodes if parent in self.lowered.batched]
        for form, is_known in ((self.joint, self._is_channelwise), (self.major, self._is_elementwise)):
            if parents and all(parent in form for parent in parents) and is_known(node, parents):
                form[node] = None

    def _is_channelwise(self, node: fx.Node, parents: list[fx.Node]) -> bool:
        root = self.lowered.root
        if MaxPool.of(node, root) is not None or isinstance(module_of(node, root), _MEANS):
            return True
        return node.target in _MEAN_FUNCTIONS or self._is_elementwise(node, parents)

    def _is_elementwise(self, node: fx.Node, parents: list[fx.Node]) -> bool:
        if node.op == "call_module":
            return isinstance(module_of(node, self.lowered.root), _ELEMENTWISE)
        if node.target in _BINARY:
            # A shared operand has C channels, not M*C; numbers have none.
            return len(parents) == len(node.all_input_nodes)
        return node.target in _METHODS if node.op == "call_method" else node.target in _FUNCTIONS

    def _hand_over(self) -> None:
        """Split joined values for the steps that were not joined."""
        for form, function in ((self.joint, split_members), (self.major, pass_members)):
            for node in form:
                users = [user for user in node.users if user not in self.joint and user not in self.major]
                if not users:
                    continue
                with self.graph.inserting_after(node):
                    args = (node, self.count) if form is self.joint else (node,)
                    split = self.graph.call_function(function, args)
                for user in users:
                    user.replace_input_with(node, split)
                self.lowered.joined.add(split)


def _softmax_dim(node: fx.Node) -> Any:
    """Over which dimension the node normalises, if it does."""
    if node.target not in (F.log_softmax, F.softmax, torch.log_softmax, torch.softmax) or len(node.args) > 2:
        return None
    return node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
