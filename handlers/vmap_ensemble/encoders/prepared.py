"""Turns a packed encoder into a forward that spares what is around its products: Python, operators, memory.

What transformers, vmap and the batching rules do in Python around each operator takes a third of the time of a
short text, and layers of all members side by side don't fit a cache. Here one member is traced, and its layers run in
one call of the kernel (native.py), or as a flat graph of fused operators (graph_run.py).
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.encoders.graph_run import GraphRun
from vmap_ensemble.encoders.layers import find_layers
from vmap_ensemble.encoders.native import NativeRun
from vmap_ensemble.encoders.packing import pack
from vmap_ensemble.encoders.trace import PackedForward, graph_arguments, trace_encoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel
from vmap_ensemble.execution.timing import Budget, time_block

logger = logging.getLogger(__name__)

# Relative to the largest output; the same products in another order. In 8 bits a rounding that falls the other way is
# a step of 127 of a row.
TOLERANCE, INT8_TOLERANCE = 1e-5, 5e-2
# How members share the cores is measured on so many tokens; a batch goes by the nearer one.
FEW_TOKENS, MANY_TOKENS = 16, 128
_ROUNDS, _BUDGET_S = 4, 0.5


class PreparedEncoder:
    """The prepared forward of all members, for any batch: vmap's work done at load, by one rule for a member's steps.

    Args:
        forward: The packed forward, float32 on a CPU.
        example: Its arguments; tells whether it is called with token types. Sizes don't matter.
        int8: Multiply in 8 bits, which is held against the forward's `loop`.

    Raises:
        UnsupportedModel: Its tensors are elsewhere or of another dtype, or the model can't be traced.
        LoadError: The graph's outputs differ from the forward's.

    Note:
        Shares the packed matrices of the forward's rules; query, key and value are packed once more, joined.
    """

    def __init__(self, forward: PackedForward, example: tuple[Any, ...], *, int8: bool = False) -> None:
        tensors = [tensor for tensor in forward.members.tensors() if tensor.is_floating_point()]
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
            raise UnsupportedModel("expected float32 weights on a CPU; use eager or compiled")
        self.forward, self._plainly = forward, forward.loop if int8 else forward
        self._tolerance = INT8_TOLERANCE if int8 else TOLERANCE
        self._with_types = len(example) > 2 and example[2] is not None
        lowered, self._structure = trace_encoder(forward, self._with_types)
        self._run = build_run(lowered, forward, int8=int8)
        self.at_a_time = {FEW_TOKENS: 1, MANY_TOKENS: 1}
        for lengths in ([1], [2], [3, 1, 3]):  # the sizes that tracing might have taken for constants, and others
            self._check(lengths)
        for tokens in self.at_a_time:
            self._choose_schedule(tokens)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts; arguments and outputs as the packed forward's."""
        if (token_type_ids is not None) != self._with_types:
            return self._plainly(input_ids, attention_mask, token_type_ids)
        packing = pack(attention_mask)
        rows = self.forward.pack_rows(packing, input_ids, token_type_ids)
        few = len(packing.index) <= (FEW_TOKENS * MANY_TOKENS) ** 0.5
        at_a_time = self.at_a_time[FEW_TOKENS if few else MANY_TOKENS]
        leaves = self._run(graph_arguments(packing, attention_mask, rows), at_a_time)
        return self.forward.unpack_outputs(pytree.tree_unflatten(leaves, self._structure), packing)

    @property
    def what(self) -> str:
        """In a few words, how the layers are run."""
        return self._run.what

    def _draw(self, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(len(lengths))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        config: Any = self.forward.model.config
        ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator)
        return ids, mask, torch.zeros_like(ids) if self._with_types else None

    def _check(self, lengths: list[int]) -> None:
        inputs = self._draw(lengths)
        outputs = [self.forward.comparable(run(*inputs), inputs, 1) for run in (self._plainly, self)]
        expected, got = map(pytree.tree_leaves, outputs)
        for own, ours in zip(expected, got, strict=True):
            if own.shape != ours.shape:
                raise LoadError(f"{lengths} tokens: expected an output of {list(own.shape)}, got {list(ours.shape)}")
            bound = self._tolerance * max(1.0, own.abs().max().item())
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


class Run(Protocol):
    """A traced encoder, ready to run.

    Attributes:
        what: In a few words, how.
    """

    what: str

    def __call__(self, arguments: list[Tensor], at_a_time: int) -> list[Any]:
        """What `graph_arguments` gives, and members at a time -> the model's outputs, each (M, ...)."""


def build_run(lowered: LoweredModel, forward: PackedForward, *, int8: bool) -> Run:
    """All layers in one call of the kernel where it takes them, else a graph of operators; the log says why.

    Raises:
        UnsupportedModel: The kernel doesn't take them, and a graph has no 8 bits.
    """
    members, found = len(forward.members.names), find_layers(lowered)
    reasons = ["they aren't those of BERT"] if found is None else found.form.reasons_against()
    if found is not None and not reasons:
        return NativeRun(lowered, members, forward.packed_weights, found, int8=int8)
    told = f"layers of '{type(forward.model).__name__}'", "; ".join(reasons)
    if int8:
        raise UnsupportedModel(f"quantization int8: {told[0]}: {told[1]}; leave it out")
    logger.info("%s run as a graph: %s", *told)
    return GraphRun(lowered, members, forward.packed_weights)
