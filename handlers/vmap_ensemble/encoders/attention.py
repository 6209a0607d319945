"""Turns packed rows of query, key and value into attention within each text, by one of several kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vmap_ensemble.encoders.batching_rules import peel, run_on_members
from vmap_ensemble.encoders.packing import Group, Packing, spread
from vmap_ensemble.execution.cuda.varlen import attend_varlen, has_varlen

ATTENTION = "vmap_ensemble_packed"
# On a CPU the fused kernel takes texts one head at a time, which costs more than it saves up to about this length:
# 4 members of 12 heads, seven texts of 8 tokens 0.24 against 0.58 ms, one of 80 0.35 against 0.51 ms, 128 equal.
SHORT_TEXT = 96
# So many scores at a time stay in the cores' caches (1 MiB) from one product to the next: eight texts of 128 tokens
# 1.55 against 1.95 ms by the fused kernel on two cores, eight of 384 14.8 against 16.7 ms (32.2 ms all at once).
SCORES = 2**18


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
    if packing.ends is not None and has_varlen(query.device, query.dtype):
        return attend_varlen(query, key, value, packing.boundaries(len(query)), packing.limit, scale)
    if not packing.groups:
        return _attend_spread(query, key, value, packing, scale)
    if len(packing.groups) == 1:
        return _attend_group(query, key, value, packing.groups[0], scale)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for group in packing.groups:
        part = slice(group.start, group.start + group.count * group.length)
        out[:, part] = _attend_group(query[:, part], key[:, part], value[:, part], group, scale)
    return out


def _attend_spread(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Attention of texts whose lengths aren't known to the host: on rows of equal width, padding masked.

    A row without a token is not a number, and read by nobody.
    """
    members, tokens = query.shape[:2]
    texts, width = packing.size
    q, k, v = (spread(t, 1, packing).flatten(0, 1).transpose(1, 2) for t in (query, key, value))
    real = spread(torch.ones(tokens, dtype=torch.bool, device=query.device), 0, packing)
    mask = real.expand(members, texts, width).reshape(members * texts, 1, 1, width)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).reshape(members, texts * width, *query.shape[2:]).index_select(1, packing.index)


def _attend_group(query: Tensor, key: Tensor, value: Tensor, group: Group, scale: float) -> Tensor:
    """Texts of one length: members and texts are one batch of the fused kernel."""
    members, tokens, heads, width = query.shape
    folded = [
        t.reshape(members * group.count, group.length, heads, width).transpose(1, 2) for t in (query, key, value)
    ]
    if query.device.type == "cpu" and group.length <= SHORT_TEXT:
        y = _attend_by_products(folded[0], folded[1], folded[2], scale)
    else:
        y = F.scaled_dot_product_attention(folded[0], folded[1], folded[2], scale=scale)
    return y.transpose(1, 2).reshape(members, tokens, heads, width)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, heads, S, D) each -> (B, heads, S, D), by two batched products, which short texts fit better."""
    size = query.shape
    q, k, v = (t.reshape(-1, *size[2:]) for t in (query, key, value))
    nothing = q.new_empty(()).expand(len(q), size[2], size[2])
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(size)


def attend_joined(joined: Tensor, groups: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of one member within each text of a packed row, for a CPU.

    Args:
        joined: (1, T, 3 * heads * D), query, key and value side by side.
        groups: (G, 3) starts, counts and lengths of the packing's groups.
        heads: How many heads there are.
        scale: Of the scores.

    Returns:
        (1, T, heads * D).
    """
    tokens, width = joined.shape[1], joined.shape[2] // 3
    texts = [
        _attend_texts(joined[0, start : start + count * length].view(count, length, 3, heads, -1), scale)
        for start, count, length in groups.tolist()
    ]
    return (texts[0] if len(texts) == 1 else torch.cat(texts)).view(1, tokens, width)


def _attend_texts(parts: Tensor, scale: float) -> Tensor:
    """(B, S, 3, heads, D) -> (B * S, heads * D)."""
    texts, length, _, heads, _ = parts.shape
    # On one core of several the fused kernel is as fast as products or faster, on two up to 1.6 times slower.
    if torch.get_num_threads() == 1:
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(query, key, value, scale=scale)
        return y.transpose(1, 2).reshape(texts * length, -1)
    rows = [_attend_in_place(part, scale) for part in parts.split(max(1, SCORES // (heads * length**2)))]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _attend_in_place(parts: Tensor, scale: float) -> Tensor:
    """As `_attend_texts`, by products whose scores are overwritten."""
    texts, length, _, heads, width = parts.shape
    query, key, value = parts.permute(2, 0, 3, 1, 4).reshape(3, texts * heads, length, width).unbind()
    nothing = query.new_empty(()).expand(len(query), length, length)
    scores = torch.baddbmm(nothing, query, key.mT, beta=0, alpha=scale)
    torch.softmax(scores, -1, out=scores)
    rows = torch.bmm(scores, value).view(texts, heads, length, width)
    return rows.transpose(1, 2).reshape(texts * length, -1)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Within it, encoders built with `ATTENTION` attend along this packing."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def current_packing() -> Packing:
    """The packing that encoders attend along here.

    Raises:
        LookupError: Nothing is packed.
    """
    packing = _packing.get()
    if packing is None:
        raise LookupError("expected to be called within `packed`")
    return packing


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    packing = _packing.get()
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing.table is not None:
        return torch.ops.vmap_ensemble.attend_packed(query, key, value, packing.table, scaling), None
    return attend_packed(query, key, value, packing, scaling), None


def _make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _packing.get() is None else None


@torch.library.custom_op("vmap_ensemble::attend_packed", mutates_args=())
def _attend_traced(query: Tensor, key: Tensor, value: Tensor, groups: Tensor, scale: float) -> Tensor:
    """`attend_packed` of one member as one step of a graph; groups (G, 3)."""
    rows = [t.transpose(1, 2) for t in (query, key, value)]
    nowhere = torch.empty(0, dtype=torch.long)
    packing = Packing((0, 0), nowhere, nowhere, tuple(Group(*group) for group in groups.tolist()))
    return _attend_members(rows[0], rows[1], rows[2], packing, scale).contiguous()


@_attend_traced.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, groups: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, _make_mask)
