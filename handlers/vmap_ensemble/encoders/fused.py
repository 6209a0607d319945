"""Turns a packed encoder into fused steps of all members at once, to be recorded: what is left of it on a GPU.

    query, key, value   one product          linear -> gelu, linear -> + residual   one step each
    layer norm          one step             everything else                        as the model has it, under vmap

A recording has no Python, so what counts is how many kernels it starts, and how fast they read weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from vmap_ensemble.encoders.attention import attend_joined, attend_packed, current_packing, packed
from vmap_ensemble.encoders.batching_rules import FastRules, peel, run_on_members
from vmap_ensemble.encoders.packing import Packing
from vmap_ensemble.encoders.trace import ATTEND, PackedForward, linear_joined, trace_encoder
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, drop_unused_slots, extract_program, join_slots
from vmap_ensemble.execution.graph.patterns import output_node
from vmap_ensemble.execution.graph.steps import linear, linear_add

_aten = torch.ops.aten


class Kernels(Protocol):
    """What computes the steps of all members."""

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str
    ) -> Tensor:
        """(M, R, in), (M, out, in), (M, out), a residual (M, R, out) and an activation's name -> (M, R, out)."""

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(M, R, H), (M, H) and (M, H) -> (M, R, H)."""


class FusedEncoder:
    """All members on packed rows: what `PackedEncoderForward.run_packed` gives, by fewer and faster kernels.

    Args:
        forward: The packed forward.
        with_types: Whether it is called with token types.
        kernels: Compute the steps.

    Raises:
        UnsupportedModel: The model can't be traced.

    Note:
        Matrices of query, key and value are kept once more, joined.
    """

    def __init__(self, forward: PackedForward, with_types: bool, kernels: Kernels) -> None:
        self.with_types = with_types
        lowered, self._structure = trace_encoder(forward, with_types)
        _fuse(lowered, _Steps(kernels))
        program = extract_program(lowered, lowered.nodes(), output_node(lowered.graph).args[0])
        self._run, self._arguments = program.compile(), [node.name for node in lowered.arguments()]
        self._inputs = [node.name for node in program.inputs]
        self._slots = [lowered.value(name) for name in program.slots]
        self._axes = [0 if name in lowered.stacked else None for name in program.slots]
        self._members = torch.arange(len(forward.members.names), device=forward.members.device)
        self._rules = FastRules()

    def __call__(self, packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor) -> Any:
        """Run all members on packed rows, (1, T) each; outputs per token stay packed.

        Args:
            packing: Where the texts are.
            ids, types, places: Of the tokens; types as `with_types` says.
        """
        nothing = packing.index.new_empty(0, 3)  # of the groups that the graph was traced for, none is asked
        mask = packing.index.new_empty(1).expand(packing.size)  # of which only the size counts
        given = [ids, types, places, packing.index, packing.first, mask, nothing]
        named = dict(zip(self._arguments, (tensor for tensor in given if tensor is not None), strict=True))
        inputs = [named[name] for name in self._inputs]
        in_dims = (0, *(None for _ in inputs), *self._axes)
        with packed(packing), self._rules:
            leaves = vmap(lambda _, *args: self._run(*args), in_dims=in_dims)(self._members, *inputs, *self._slots)
        return pytree.tree_unflatten(leaves, self._structure)


def _fuse(lowered: LoweredModel, steps: _Steps) -> None:
    """Put the steps that all members take at once in the place of one member's."""
    for node in lowered.nodes():
        args: Any = node.args
        if node.target is linear:
            x, weight, bias, activation = args
            node.target, node.args = steps.multiply, (x, weight, bias, None, activation)
        elif node.target is linear_add:
            x, other, weight, bias = args
            node.target, node.args = steps.multiply, (x, weight, bias, other, "none")
        elif node.target is linear_joined:
            x, weights, biases = args
            bias = None if biases is None else join_slots(lowered, biases)
            node.target, node.args = steps.multiply, (x, join_slots(lowered, weights), bias, None, "none")
        elif node.target is torch.layer_norm:
            node.target = steps.normalise
        elif node.target is _aten.embedding.default:
            node.target, node.args, node.kwargs = F.embedding, (args[1], args[0]), {}
        elif node.target is attend_joined:
            node.target = _attend_joined
        elif node.target is ATTEND:
            node.target = _attend
    drop_unused_slots(lowered)
    lowered.graph.lint()


class _Steps:
    """Steps of a member as the graph calls them inside vmap: for all members at once, where weights are their own."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str
    ) -> Tensor:
        """A linear layer, its residual, its activation: (1, T, in) -> (1, T, out)."""
        peeled = peel(x, weight, bias, other)
        if peeled is None or not peeled[1][1]:  # a matrix that members share: the rules know what is best
            return linear(x, weight, bias, activation) if other is None else linear_add(x, other, weight, bias)
        (x, w, b, o), own = peeled
        members, outputs, _ = w.shape
        inner = x.shape[1:-1] if own[0] else x.shape[:-1]

        def run() -> Tensor:
            rows, residual = (_members_rows(t, mine, members) for t, mine in ((x, own[0]), (o, own[3])))
            biases = b if b is None or own[2] else b.expand(members, -1)
            return self._kernels.multiply(rows, w, biases, residual, activation).view(members, *inner, outputs)

        return run_on_members(run)

    def normalise(self, x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """A layer norm over the last axis: (1, T, H) -> (1, T, H)."""
        peeled = peel(x, weight, bias)
        if peeled is None or not (peeled[1][1] and peeled[1][2]) or len(shape) > 1:
            return F.layer_norm(x, shape, weight, bias, eps)
        (x, w, b), own = peeled
        size = x.shape[1:] if own[0] else x.shape

        def run() -> Tensor:
            rows = _members_rows(x, own[0], len(w))
            return self._kernels.normalise(rows, w, b, eps).view(len(w), *size)

        return run_on_members(run)


def _members_rows(tensor: Any, own: bool, members: int) -> Any:
    """(M, ..., H), or (..., H) of all members -> (M, R, H); None stays."""
    if tensor is None:
        return None
    whole = tensor if own else tensor.expand(members, *tensor.shape)
    return whole.reshape(members, -1, tensor.shape[-1])


def _attend_joined(joined: Tensor, _groups: Tensor, heads: int, scale: float) -> Tensor:
    """Attention along the current packing: (1, T, 3 * heads * D) -> (1, T, heads * D)."""
    tokens = joined.shape[1]
    query, key, value = joined.view(1, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    return attend_packed(query, key, value, current_packing(), scale).reshape(1, tokens, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, _groups: Tensor, scale: float) -> Tensor:
    """Attention along the current packing: (1, heads, T, D) each -> (1, T, heads, D)."""
    return attend_packed(query, key, value, current_packing(), scale)
