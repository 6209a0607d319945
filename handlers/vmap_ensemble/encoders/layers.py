"""Finds in a traced encoder the layers that the kernel of whole encoders computes, and where their weights are.

A layer is attention on the joined product of its rows, and a feed-forward step, each with a residual and a layer norm
behind it (post-norm): BERT, RoBERTa, ELECTRA, DistilBERT.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vmap_ensemble.encoders.attention import attend_joined
from vmap_ensemble.encoders.trace import linear_joined
from vmap_ensemble.execution.cpu.encoder_layers import LayerForm, LayerTensors
from vmap_ensemble.execution.graph.lowered_model import LoweredModel
from vmap_ensemble.execution.graph.patterns import only_user
from vmap_ensemble.execution.graph.steps import linear, linear_add

_aten = torch.ops.aten


@dataclass(frozen=True)
class FoundLayer:
    """A layer in the graph.

    Attributes:
        rows: The node whose rows go in.
        end: The node whose rows come out.
        form: As the kernel is told.
        slots: Of the weights, in the order of `LayerTensors`; the first two hold query's, key's and value's.
    """

    rows: fx.Node
    end: fx.Node
    form: LayerForm
    slots: tuple[Any, ...]

    def is_own(self, lowered: LoweredModel) -> bool:
        """Whether members differ in any of its weights."""
        names = [node.name for slot in self.slots for node in (slot if isinstance(slot, tuple) else (slot,))]
        return any(name in lowered.stacked for name in names)

    def tensors(self, lowered: LoweredModel) -> LayerTensors:
        """Its weights, (M, ...) if they are members' own, else (1, ...)."""
        joined, joined_bias, *others = self.slots
        rows = [[_with_members(lowered, part) for part in parts] for parts in (joined, joined_bias)]
        tensors = [torch.cat(_same_members(parts), dim=1) for parts in rows]
        return LayerTensors(*_same_members([*tensors, *(_with_members(lowered, slot) for slot in others)]))


@dataclass(frozen=True)
class FoundLayers:
    """All layers of an encoder, one behind the other.

    Attributes:
        layers: At least one, of one form.
        result: The node whose value is wanted: the last layer's end, or what picks each text's first row of it.
        first_only: Whether it is the latter.
    """

    layers: tuple[FoundLayer, ...]
    result: fx.Node
    first_only: bool

    @property
    def form(self) -> LayerForm:
        """Of each of them."""
        return self.layers[0].form


def find_layers(lowered: LoweredModel) -> FoundLayers | None:
    """The layers of a traced encoder; None if one isn't as the kernel has it, or another step looks into them."""
    attentions = lowered.graph.find_nodes(op="call_function", target=attend_joined)
    found = [_layer_around(node) for node in attentions]
    layers = tuple(layer for layer in found if layer is not None)
    if not layers or len(layers) < len(found) or any(layer.form != layers[0].form for layer in layers):
        return None
    for before, after in itertools.pairwise(layers):
        if after.rows is not before.end or len(before.end.users) != 2:
            return None
    picked = _first_rows(layers[-1].end, lowered)
    return FoundLayers(layers, picked or layers[-1].end, picked is not None)


def _layer_around(attend: fx.Node) -> FoundLayer | None:
    """The layer of an attention."""
    joined, _, heads, scale = attend.args
    out, norm = _followers(attend, linear_add, torch.layer_norm)
    if not isinstance(joined, fx.Node) or joined.target is not linear_joined or out is None or norm is None:
        return None
    steps = list(norm.users)
    up = next((step for step in steps if step.target is linear), None)
    down, end = (None, None) if up is None else _followers(up, linear_add, torch.layer_norm)
    if up is None or down is None or end is None or set(steps) != {up, down}:
        return None
    rows, weights, biases = joined.args
    if out.args[:2] != (attend, rows) or down.args[:2] != (up, norm) or only_user(joined) is not attend:
        return None
    if norm.args[1] != end.args[1] or len(norm.args[1]) != 1 or norm.args[4] != end.args[4]:  # type: ignore[arg-type]
        return None
    slots = (weights, biases, *out.args[2:], *norm.args[2:4], *up.args[1:3], *down.args[2:], *end.args[2:4])
    if any(slot is None for slot in slots):
        return None
    hidden, inner = norm.args[1][0], up.meta["val"].shape[-1]  # type: ignore[index]
    if attend.meta["val"].shape[-1] != hidden:
        return None  # heads were pruned away: attention is narrower than the rows
    form = LayerForm(hidden, inner, heads, up.args[3], norm.args[4], scale)  # type: ignore[arg-type]
    return FoundLayer(rows, end, form, slots)  # type: ignore[arg-type]


def _followers(node: fx.Node, *targets: Any) -> tuple[fx.Node | None, ...]:
    """The steps behind a node, each the only one that takes the value before it; None from the first that differs."""
    found: list[fx.Node | None] = []
    step: fx.Node | None = node
    for target in targets:
        step = None if step is None else only_user(step)
        step = step if step is not None and step.target is target else None
        found.append(step)
    return tuple(found)


def _first_rows(end: fx.Node, lowered: LoweredModel) -> fx.Node | None:
    """The node that picks each text's first row, if nobody takes another one."""
    squeezed, picked = _followers(end, _aten.squeeze.dim, _aten.index_select.default)
    first = lowered.arguments()[-3]  # see `graph_arguments`
    return picked if squeezed is not None and picked is not None and picked.args[1:] == (0, first) else None


def _with_members(lowered: LoweredModel, slot: fx.Node) -> Tensor:
    value = lowered.value(slot.name)
    return value if slot.name in lowered.stacked else value.unsqueeze(0)


def _same_members(tensors: list[Tensor]) -> list[Tensor]:
    """(M, ...) or (1, ...) each -> all of the same first size."""
    members = max(len(tensor) for tensor in tensors)
    return [tensor.expand(members, *tensor.shape[1:]) for tensor in tensors]
