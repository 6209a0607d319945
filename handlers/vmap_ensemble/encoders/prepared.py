"""Turns a packed encoder into a vmapped forward that runs each member as a flat graph on oneDNN's packed weights.

What transformers, vmap and the batching rules do in Python around each operator takes a third of the time of a
short text, and layers of all members side by side don't fit a cache. Here a member's layers run one after another,
as one custom operator whose vmap rule runs the members, on a core each where that is measured faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vmap_ensemble.encoders.packing import pack
from vmap_ensemble.encoders.trace import PackedForward, graph_arguments, linear_joined, trace_encoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.layers import add_packed_slot, write_step
from vmap_ensemble.execution.cpu.onednn import linear_add_step, linear_step
from vmap_ensemble.execution.cpu.prepared import PackedGraph, PreparedForward
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel, drop_unused_slots, slot_name
from vmap_ensemble.execution.graph.steps import MIN_LINEAR_WEIGHTS, linear, linear_add
from vmap_ensemble.execution.timing import Budget, time_block

# Relative to the largest output; the same products in another order.
TOLERANCE = 1e-5
# How members share the cores is measured on so many tokens; a batch goes by the nearer one.
FEW_TOKENS, MANY_TOKENS = 16, 128
_ROUNDS, _BUDGET_S = 4, 0.5


class PreparedEncoder:
    """The prepared forward of all members, for any batch: vmap's work done at load, by one rule for a member's steps.

    Args:
        forward: The packed forward, float32 on a CPU.
        example: Its arguments; tells whether it is called with token types. Sizes don't matter.

    Raises:
        UnsupportedModel: Its tensors are elsewhere or of another dtype, or the model can't be traced.
        LoadError: The graph's outputs differ from the forward's.

    Note:
        Shares the packed matrices of the forward's rules; query, key and value are packed once more, joined.
    """

    def __init__(self, forward: PackedForward, example: tuple[Any, ...]) -> None:
        tensors = [tensor for tensor in forward.members.tensors() if tensor.is_floating_point()]
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
            raise UnsupportedModel("expected float32 weights on a CPU; use eager or compiled")
        self.forward = forward
        self._with_types = len(example) > 2 and example[2] is not None
        lowered, self._structure = trace_encoder(forward, self._with_types)
        packed = pack_layers(lowered, forward.packed_weights)
        values = {node: node.meta["val"] for node in lowered.nodes()}
        graph = PackedGraph(lowered.nodes(), [], values, packed, f"{len(packed)} linear layers on packed weights")
        self._run = PreparedForward(lowered, len(forward.members.names), graph)
        self.at_a_time = {FEW_TOKENS: 1, MANY_TOKENS: 1}
        for lengths in ([1], [2], [3, 1, 3]):  # the sizes that tracing might have taken for constants, and others
            self._check(lengths)
        for tokens in self.at_a_time:
            self._choose_schedule(tokens)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts; arguments and outputs as the packed forward's."""
        if (token_type_ids is not None) != self._with_types:
            return self.forward(input_ids, attention_mask, token_type_ids)
        packing = pack(attention_mask)
        rows = self.forward.pack_rows(packing, input_ids, token_type_ids)
        few = len(packing.index) <= (FEW_TOKENS * MANY_TOKENS) ** 0.5
        self._run.schedule = Schedule(joint=False, at_a_time=self.at_a_time[FEW_TOKENS if few else MANY_TOKENS])
        leaves = self._run(*graph_arguments(packing, attention_mask, rows))
        return self.forward.unpack_outputs(pytree.tree_unflatten(leaves, self._structure), packing)

    def _draw(self, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(len(lengths))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        config: Any = self.forward.model.config
        ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator)
        return ids, mask, torch.zeros_like(ids) if self._with_types else None

    def _check(self, lengths: list[int]) -> None:
        inputs = self._draw(lengths)
        expected, got = (pytree.tree_leaves(run(*inputs)) for run in (self.forward, self))
        for own, ours in zip(expected, got, strict=True):
            if own.shape != ours.shape:
                raise LoadError(f"{lengths} tokens: expected an output of {list(own.shape)}, got {list(ours.shape)}")
            bound = TOLERANCE * max(1.0, own.abs().max().item())
            if not torch.allclose(own, ours, rtol=0, atol=bound, equal_nan=True):
                raise LoadError(f"{lengths} tokens: the graph differs from the forward by more than {bound:.0e}")

    def _choose_schedule(self, tokens: int) -> None:
        """Find how many members at a time are fastest for so many tokens: all cores for one, or a core for each."""
        candidates = sorted({1, min(len(self.forward.members.names), torch.get_num_threads())})
        length = min(FEW_TOKENS, self.forward.longest)
        inputs = self._draw([length] * (tokens // length))
        spans_s: dict[int, list[float]] = {candidate: [] for candidate in candidates}
        for _ in Budget(_BUDGET_S).rounds(_ROUNDS if len(candidates) > 1 else 0, least=1):
            for candidate, own in spans_s.items():
                self.at_a_time[tokens] = candidate
                own.append(time_block(self, inputs, about_s=own[-1] if own else 0.0))
        self.at_a_time[tokens] = min(candidates, key=lambda candidate: min(spans_s[candidate], default=0.0))


def pack_layers(lowered: LoweredModel, pack_weight: Callable[[Tensor], list[Tensor]]) -> dict[str, list[Any]]:
    """Put the linear layers on packed weights, in place.

    Args:
        lowered: The traced graph.
        pack_weight: (M, out, in) or (out, in) weights -> packed ones, one per member, or one in all.

    Returns:
        Slot name -> packed weights, one per member, or one in all if members share them.
    """
    packed: dict[str, list[Any]] = {}
    for node in lowered.nodes():
        if node.target is linear_joined:
            _pack_joined(lowered, node, packed, pack_weight)
        elif node.target in (linear, linear_add):
            _pack_one(lowered, node, packed, pack_weight)
    drop_unused_slots(lowered)
    return packed


def _pack_one(
    lowered: LoweredModel, node: fx.Node, packed: dict[str, list[Any]], pack_weight: Callable[[Tensor], list[Tensor]]
) -> None:
    args: Any = node.args
    weight = args[1] if node.target is linear else args[2]
    tensor = lowered.value(weight.name)
    is_plain = node.target is linear and args[3] == "none"
    if is_plain and tensor.shape[-2:].numel() < MIN_LINEAR_WEIGHTS:
        write_step(node, (F.linear, args[:3]))
        return
    slot = add_packed_slot(lowered, weight)
    packed[slot.name] = pack_weight(tensor)
    if node.target is linear:
        x, _, bias, activation = args
        write_step(node, linear_step(x, slot, bias, activation))
    else:
        x, other, _, bias = args
        write_step(node, linear_add_step(x, other, slot, bias))


def _pack_joined(
    lowered: LoweredModel, node: fx.Node, packed: dict[str, list[Any]], pack_weight: Callable[[Tensor], list[Tensor]]
) -> None:
    x, weights, biases = node.args
    weight = _join_slots(lowered, weights)
    packed[weight.name] = pack_weight(lowered.value(weight.name))
    lowered.slots[weight.name] = packed[weight.name][0]  # the plain copy gives its memory back
    bias = None if biases is None else _join_slots(lowered, biases)
    write_step(node, linear_step(cast(fx.Node, x), weight, bias, "none"))


def _join_slots(lowered: LoweredModel, parts: Any) -> fx.Node:
    """A slot for tensors one below the other; (M, ...) if a member has one of them for itself."""
    tensors = [lowered.value(part.name) for part in parts]
    own = [part.name in lowered.stacked for part in parts]
    if any(own):
        count = len(tensors[own.index(True)])
        tensors = [t if mine else t.expand(count, *t.shape) for t, mine in zip(tensors, own, strict=True)]
    joined = torch.cat(tensors, dim=1 if any(own) else 0)
    return lowered.add_slot(slot_name(f"{parts[0].name}_joined"), joined, any(own))
