"""Turns a padded batch of texts into one row of real tokens, attends within each text, and turns rows back.

    (B, S) mask -> Packing -> (1, T, H) rows, T real tokens -> (B, S, H)

Everything here works on one member's tensors and, inside vmap, on all members' at once. The effective
transformer's idea (https://github.com/bytedance/effective_transformer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        groups: The texts by length; none while a forward is recorded, for any lengths that a bucket holds.
        table: While an encoder is traced, (G, 3) starts, counts and lengths of whatever groups there will be.
        ends: (B + 1,) where each text begins in the packed row, and the end.
        limit: Tokens that no text has more of.
    """

    size: tuple[int, int]
    index: Tensor
    first: Tensor
    groups: tuple[Group, ...]
    table: Tensor | None = None
    ends: Tensor | None = None
    limit: int = 0
    _boundaries: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def boundaries(self, members: int) -> Tensor:
        """(M * B + 1,) int32: where each text of each member begins in the members' rows, one after another.

        Worked out once: every layer asks for it.
        """
        if self.ends is not None and members not in self._boundaries:
            tokens, device = len(self.index), self.ends.device
            rows = torch.arange(0, members * tokens, tokens, device=device)
            starts = (rows[:, None] + self.ends[:-1]).flatten()
            self._boundaries[members] = torch.cat([starts, self.ends[-1:] + rows[-1:]]).to(torch.int32)
        return self._boundaries[members]


def pack(attention_mask: Tensor, device: torch.device | None = None) -> Packing:
    """Find the real tokens, on the host.

    Args:
        attention_mask: (B, S) of 0 and 1; each text has at least one token, anywhere in its row.
        device: Where the places of the tokens go; by default to the mask's.

    Raises:
        ItemError: A text has no token.
    """
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1)
    check_lengths(lengths.tolist())
    order = lengths.argsort(stable=True)
    rows, columns = mask[order].nonzero(as_tuple=True)
    index = order[rows] * mask.shape[1] + columns
    ordered = lengths[order]
    starts = ordered.cumsum(0) - ordered
    first = torch.empty_like(starts)
    first[order] = starts
    device = attention_mask.device if device is None else device
    groups = group_lengths(ordered.tolist())
    ends = F.pad(ordered.cumsum(0), (1, 0)).to(device)
    size = (mask.shape[0], mask.shape[1])
    return Packing(size, index.to(device), first.to(device), groups, ends=ends, limit=groups[-1].length)


def check_lengths(lengths: Sequence[int]) -> None:
    """Refuse texts without tokens.

    Raises:
        ItemError: Names the first.
    """
    if 0 in lengths:
        raise UnreadableItem(f"text {lengths.index(0)} of the batch has no token; expected at least one")


def group_lengths(lengths: list[int]) -> tuple[Group, ...]:
    """Ascending lengths of texts that lie one after another -> groups of one length."""
    groups: list[Group] = []
    start = 0
    for length in sorted(set(lengths)):
        count = lengths.count(length)
        groups.append(Group(start, count, length))
        start += count * length
    return tuple(groups)


def unpack(tokens: Tensor, packing: Packing) -> Tensor:
    """(1, T, ...) -> (B, S, ...), zero where there is padding. Inside vmap as well."""
    return _on_packed_row(tokens, lambda row, axis: spread(row, axis, packing))


def spread(row: Tensor, axis: int, packing: Packing) -> Tensor:
    """Packed tokens along an axis, (..., T, ...) -> (..., B, S, ...), zero where there is padding."""
    batch, width = packing.size
    rest = row.shape[axis + 1 :]
    padded = row.new_zeros(*row.shape[:axis], batch * width, *rest).index_copy(axis, packing.index, row)
    return padded.view(*row.shape[:axis], batch, width, *rest)


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
