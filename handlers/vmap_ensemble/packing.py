"""Turns a padded batch of texts into one row of tokens for the encoder, and its outputs back into a batch.

    (B, S) ids and mask -> (1, T) ids and positions, T real tokens -> encoder -> (1, T, H) -> (B, S, ...)

Padding is neither embedded nor multiplied; attention runs per text. The effective transformer's idea
(https://github.com/bytedance/effective_transformer), on any encoder that asks transformers' AttentionInterface.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto import modeling_auto

from vmap_ensemble.batching_rules import FastRules, peel, run_on_members
from vmap_ensemble.errors import LoadError, RequestError
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.members import StackedMembers

logger = logging.getLogger(__name__)

ATTENTION = "vmap_ensemble_packed"

Positions = Callable[[Tensor, int], Tensor]


def count_columns(input_ids: Tensor, _padding_id: int) -> Tensor:
    """Position ids of BERT: the column. (B, S) -> (B, S)."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def count_real_tokens(input_ids: Tensor, padding_id: int) -> Tensor:
    """Position ids of RoBERTa: counted over what isn't the padding token, from padding_id + 1. (B, S) -> (B, S)."""
    real = input_ids.ne(padding_id)
    return real.cumsum(1) * real + padding_id


# Encoders that ask the AttentionInterface and take position_ids; the others are padded to the longest text.
POSITIONS: dict[str, Positions] = {
    "bert": count_columns,
    "distilbert": count_columns,
    "electra": count_columns,
    "roberta": count_real_tokens,
    "xlm-roberta": count_real_tokens,
    "camembert": count_real_tokens,
}
_FIRST_TOKEN_HEADS = frozenset(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_TOKEN_HEADS = frozenset(
    name
    for mapping in (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    for name in mapping.values()
)


@dataclass(frozen=True)
class Group:
    """Texts of one length that lie side by side in the packed row: `count` texts of `length` from `start`."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch are.

    Attributes:
        size: (B, S) of the padded batch.
        index: (T,) places of the packed tokens in the flattened batch, texts ordered by length.
        first: (B,) places in the packed row of each text's first token.
        groups: The texts by length.
    """

    size: tuple[int, int]
    index: Tensor
    first: Tensor
    groups: tuple[Group, ...]


def pack(attention_mask: Tensor) -> Packing:
    """Find the real tokens.

    Args:
        attention_mask: (B, S) of 0 and 1; each text has at least one token, anywhere in its row.

    Raises:
        RequestError: A text has no token.
    """
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1)
    if not bool(lengths.all()):
        raise RequestError(400, f"text {int(lengths.argmin())} of the batch has no token; expected at least one")
    order = lengths.argsort(stable=True)
    rows, columns = mask[order].nonzero(as_tuple=True)
    index = order[rows] * mask.shape[1] + columns
    ordered = lengths[order]
    starts = ordered.cumsum(0) - ordered
    first = torch.empty_like(starts)
    first[order] = starts
    device = attention_mask.device
    return Packing((mask.shape[0], mask.shape[1]), index.to(device), first.to(device), _group(ordered.tolist()))


def _group(lengths: list[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    start = 0
    for length in sorted(set(lengths)):
        count = lengths.count(length)
        groups.append(Group(start, count, length))
        start += count * length
    return tuple(groups)


def unpack(tokens: Tensor, packing: Packing) -> Tensor:
    """(1, T, ...) -> (B, S, ...), zero where there is padding. Inside vmap as well."""

    def scatter(row: Tensor, axis: int) -> Tensor:
        batch, width = packing.size
        rest = row.shape[axis + 1 :]
        padded = row.new_zeros(*row.shape[:axis], batch * width, *rest).index_copy(axis, packing.index, row)
        return padded.view(*row.shape[:axis], batch, width, *rest)

    return _on_packed_row(tokens, scatter)


def take_first(tokens: Tensor, packing: Packing) -> Tensor:
    """(1, T, H) -> (B, 1, H): each text's first token, all that a classification head reads."""
    return _on_packed_row(tokens, lambda row, axis: row.index_select(axis, packing.first).unsqueeze(axis + 1))


def _on_packed_row(tokens: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Call function(row, axis) on the row of tokens without its leading 1; axis is where its tokens are."""
    peeled = peel(tokens)
    if peeled is None:
        return function(tokens.squeeze(0), 0)
    row = peeled[0][0]
    return run_on_members(lambda: function(row.squeeze(1), 1))


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Attention within each text of a packed row.

    Args:
        query, key, value: (1, heads, T, D), of one member or of all inside vmap.
        packing: Where the texts are.
        scale: Of the scores.

    Returns:
        (1, T, heads, D).
    """
    peeled = peel(query, key, value)
    if peeled is None:
        rows = [t.transpose(1, 2) for t in (query, key, value)]
        return _attend_members(rows[0], rows[1], rows[2], packing, scale)
    plain, batched = peeled
    members = next(len(t) for t, own in zip(plain, batched, strict=True) if own)

    def attend() -> Tensor:
        folded = [
            (t.squeeze(1) if own else t.expand(members, -1, -1, -1)).transpose(1, 2)
            for t, own in zip(plain, batched, strict=True)
        ]
        return _attend_members(folded[0], folded[1], folded[2], packing, scale).unsqueeze(1)

    return run_on_members(attend)


def _attend_members(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """(M, T, heads, D) each -> (M, T, heads, D)."""
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _attend_varlen(query, key, value, packing, scale)
    if len(packing.groups) == 1:
        return _attend_group(query, key, value, packing.groups[0], scale)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for group in packing.groups:
        part = slice(group.start, group.start + group.count * group.length)
        out[:, part] = _attend_group(query[:, part], key[:, part], value[:, part], group, scale)
    return out


def _attend_group(query: Tensor, key: Tensor, value: Tensor, group: Group, scale: float) -> Tensor:
    """Texts of one length: members and texts are one batch of the fused kernel."""
    members, tokens, heads, width = query.shape
    folded = [
        t.reshape(members * group.count, group.length, heads, width).transpose(1, 2) for t in (query, key, value)
    ]
    y = F.scaled_dot_product_attention(folded[0], folded[1], folded[2], scale=scale)
    return y.transpose(1, 2).reshape(members, tokens, heads, width)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """CUDA's flash attention on texts of any length: the members' rows are one longer row."""
    from torch.nn.attention.varlen import varlen_attn

    members, tokens = query.shape[:2]
    ends = boundaries(packing, members).to(query.device)
    longest = packing.groups[-1].length
    q, k, v = (t.reshape(members * tokens, *t.shape[2:]) for t in (query, key, value))
    y: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale)
    return y.view(query.shape)


def boundaries(packing: Packing, members: int) -> Tensor:
    """(M * B + 1,) int32: where each text of each member begins in the members' rows, one after another."""
    lengths = [group.length for group in packing.groups for _ in range(group.count)]
    return F.pad(torch.tensor(lengths * members).cumsum(0), (1, 0)).to(torch.int32)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Within it, encoders built with `ATTENTION` attend along this packing."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    packing = _packing.get()
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    return attend_packed(query, key, value, packing, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _packing.get() is None else None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, _make_mask)


class PackedEncoderForward(EnsembleForward):
    """The vmapped forward of a Hugging Face encoder that computes no padding.

    Arguments of a call: input_ids (B, S), attention_mask (B, S), token_type_ids (B, S) or None. Outputs as the
    model's own, each tensor (M, B, ...); those per token are zero at padding. `loop` is the plain padded loop.

    Args:
        model: An encoder with any head, in eval mode.
        members: Its stacked members.
        prepack: Keep the matrices in oneDNN's order as well, for short inputs on a CPU (their size once more).

    Raises:
        LoadError: The model has no encoder that transformers knows as its base model.
    """

    def __init__(self, model: PreTrainedModel, members: StackedMembers, prepack: bool = True) -> None:
        super().__init__(model, members)
        self._rules = FastRules(members.stacked if prepack else None)
        self.rules = lambda: self._rules
        self._encoder = find_encoder(model)
        self._padding_id = int(model.config.pad_token_id or 0)
        self._positions = POSITIONS.get(model.config.model_type)
        self._per_token = type(model).__name__ in _TOKEN_HEADS
        self._first_only = type(model).__name__ in _FIRST_TOKEN_HEADS
        if self._positions is None:
            name = model.config.model_type
            logger.warning("padding of '%s' can't be removed: it is padded to the longest text", name)
        else:
            model.set_attn_implementation(ATTENTION)

    @property
    def packs(self) -> bool:
        """Whether padding is removed; otherwise it is cut to the longest text."""
        return self._positions is not None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts in one vmapped call; see the class."""
        if self._positions is None:
            return self._run_padded(input_ids, attention_mask, token_type_ids)
        packing = pack(attention_mask)
        positions = self._positions(input_ids, self._padding_id)
        ids, places = (t.reshape(-1)[packing.index].unsqueeze(0) for t in (input_ids, positions))
        types = None if token_type_ids is None else token_type_ids.reshape(-1)[packing.index].unsqueeze(0)
        with packed(packing), self._unpacking(packing):
            outputs = self._run(ids, None, types, places)
        if self._per_token:
            outputs = pytree.tree_map(lambda t: torch.stack([unpack(row, packing) for row in t]), outputs)
        return outputs

    @contextmanager
    def _unpacking(self, packing: Packing) -> Iterator[None]:
        """Within it the encoder hands its head what the head expects: a batch."""
        if self._per_token:
            yield  # such a head treats every token alike, so it runs on the packed row
            return
        turn = take_first if self._first_only else unpack

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            output.last_hidden_state = turn(output.last_hidden_state, packing)
            return output

        handle = self._encoder.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _run_padded(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
        width = int(attention_mask.bool().any(0).nonzero().max()) + 1
        types = None if token_type_ids is None else token_type_ids[:, :width]
        return self._run(input_ids[:, :width], attention_mask[:, :width], types, None)

    def _run(self, *inputs: Tensor | None) -> Any:
        in_dims = (0, 0, None, *(None for _ in inputs))
        with self.rules():
            return vmap(self._member, in_dims=in_dims)(self._index, self._own, self.members.shared, *inputs)

    def _member(self, _index: Tensor, own: dict[str, Tensor], shared: dict[str, Tensor], *inputs: Any) -> Any:
        keywords = _name_inputs(*inputs)
        return functional_call(self.model, self._join_ties({**shared, **own}), (), keywords)

    def member(self, index: int, *inputs: Any) -> Any:
        """Run one member alone, as Hugging Face does: padded, without vmap; outputs (B, ...)."""
        return functional_call(self.model, self.member_state(index), (), _name_inputs(*inputs))


def _name_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
    }
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def find_encoder(model: PreTrainedModel) -> nn.Module:
    """The submodule that holds the base model's layers.

    Raises:
        LoadError: There is none.
    """
    for name in ("encoder", "transformer"):
        encoder = getattr(model.base_model, name, None)
        if isinstance(encoder, nn.Module):
            return encoder
    where = f"'encoder' or 'transformer' in its {type(model.base_model).__name__}"
    raise LoadError(f"{type(model).__name__}: expected the layers under {where}, found neither")
