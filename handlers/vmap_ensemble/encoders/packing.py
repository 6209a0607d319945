"""Turns a padded batch of texts into one row of real tokens, attends within each text, and turns rows back.

    (B, S) mask -> Packing -> (1, T, H) rows, T real tokens -> (B, S, H)

Everything here works on one member's tensors and, inside vmap, on all members' at once. The effective
transformer's idea (https://github.com/bytedance/effective_transformer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vmap_ensemble.encoders.batching_rules import peel, run_on_members
from vmap_ensemble.errors import UnreadableItem


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
        table: While an encoder is traced, (G, 3) starts, counts and lengths of whatever groups there will be.
    """

    size: tuple[int, int]
    index: Tensor
    first: Tensor
    groups: tuple[Group, ...]
    table: Tensor | None = None


def pack(attention_mask: Tensor) -> Packing:
    """Find the real tokens.

    Args:
        attention_mask: (B, S) of 0 and 1; each text has at least one token, anywhere in its row.

    Raises:
        ItemError: A text has no token.
    """
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1)
    if not bool(lengths.all()):
        raise UnreadableItem(f"text {int(lengths.argmin())} of the batch has no token; expected at least one")
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


def boundaries(packing: Packing, members: int) -> Tensor:
    """(M * B + 1,) int32: where each text of each member begins in the members' rows, one after another."""
    lengths = [group.length for group in packing.groups for _ in range(group.count)]
    return F.pad(torch.tensor(lengths * members).cumsum(0), (1, 0)).to(torch.int32)
