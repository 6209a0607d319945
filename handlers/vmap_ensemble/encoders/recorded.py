"""Turns batches of texts of any length into the static inputs of recordings, one for each bucket of sizes.

    PackedTexts   (B, S) ids and mask -> T real tokens, filled up to a bucket of tokens: the filling is one more text
    PaddedTexts   (B, S) ids and mask -> a bucket of texts as long as the longest: for members one after another

Everything is laid out on the host, as one vector of integers that goes to the device in one copy: nothing between it
and the outputs waits for the device. What a bucket doesn't fix, such as where each text ends, is read on the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.encoders.packing import Packing, pack
from vmap_ensemble.execution.cuda.graphs import BUCKETS, check_buckets, find_bucket
from vmap_ensemble.execution.timing import Run

# Texts without tokens cost next to nothing where only tokens are computed: few buckets, and so few recordings.
PACKED_BUCKETS = (1, 8, 64)
STEPS = 8  # buckets for each doubling of the tokens: an eighth of a bucket at most is filled up


def round_up(tokens: int) -> int:
    """The bucket for so many tokens, of which they fill seven eighths at least."""
    step = max(1, 2 ** (tokens - 1).bit_length() // (2 * STEPS))
    return -(-tokens // step) * step


class TextForward(Protocol):
    """What is asked of the forward of an encoder, to record what takes its arguments.

    Attributes:
        per_token: Whether all outputs are (M, B, S, ...); else those of more than three axes are.
    """

    per_token: bool

    @property
    def device(self) -> torch.device:
        """Where the members are."""

    @property
    def padding_id(self) -> int:
        """The token that stands where there is none."""

    def widen(self, width: int) -> int:
        """A width that a batch may be padded to without another answer."""


class StaticForward(TextForward, Protocol):
    """What is asked of the forward of an encoder without padding, to record it."""

    @property
    def longest(self) -> int:
        """The longest text in tokens."""

    @property
    def needs_width(self) -> bool:
        """Whether the recorded part lays tokens out in rows of a width."""

    def pack_rows(
        self, packing: Packing, input_ids: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, token types and position ids of the real tokens: (B, S) each -> (1, T)."""

    def run_packed(self, packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor) -> Any:
        """Run all members on packed rows; outputs per token stay packed."""

    def unpack_outputs(self, outputs: Any, packing: Packing) -> Any:
        """Outputs per token of a packed row, (M, 1, T, ...) -> (M, B, S, ...)."""


class PackedTexts:
    """Lays out batches for a forward that computes no padding; see `Laid`.

    Args:
        forward: What is recorded.
        buckets: Numbers of texts, ascending; None: few, or `BUCKETS` where rows have a width.
    """

    def __init__(self, forward: StaticForward, buckets: Sequence[int] | None) -> None:
        few = BUCKETS if forward.needs_width else PACKED_BUCKETS
        self.forward, self.buckets = forward, check_buckets(few if buckets is None else buckets)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> PackedBatch | None:
        """A batch in the next larger bucket; None if it has more texts than any."""
        bucket = find_bucket(self.buckets, len(input_ids))
        if bucket is None:
            return None
        ids, mask, types = (None if t is None else t.cpu() for t in (input_ids, attention_mask, token_type_ids))
        packing = pack(mask)  # type: ignore[arg-type]
        ids, types, places = self.forward.pack_rows(packing, ids, types)  # type: ignore[arg-type]
        width = int(mask.any(0).nonzero().max()) + 1  # type: ignore[union-attr]
        sizes = Sizes(round_up(len(packing.index)), bucket, round_up(width) if self.forward.needs_width else 0)
        return PackedBatch(self.forward, packing, (ids, types, places), sizes, width)


@dataclass(frozen=True)
class Sizes:
    """A bucket: how many tokens and texts it holds, the filling apart, and how wide its rows are, 0 for no rows."""

    tokens: int
    texts: int
    width: int


@dataclass(frozen=True)
class PackedBatch:
    """Texts without padding in a bucket; see `Laid`.

    Attributes:
        forward: What is recorded.
        packing: Where the tokens of the batch are.
        rows: Ids, token types and position ids of its tokens, (1, T) each, on the host.
        sizes: Of the bucket.
        width: Columns of the batch that hold tokens.
    """

    forward: StaticForward
    packing: Packing
    rows: tuple[Tensor, Tensor | None, Tensor]
    sizes: Sizes
    width: int

    @property
    def key(self) -> Hashable:
        """The bucket, and whether there are token types."""
        return (self.sizes, self.rows[1] is None)

    @cached_property
    def _vector(self) -> Tensor:
        """Ids, types, position ids, places in the padded batch; first tokens; ends of texts."""
        filling = self.sizes.tokens - len(self.packing.index)
        rows = [F.pad(row[0], (0, filling)) for row in self.rows if row is not None]
        return torch.cat([*rows, self._places(filling), *self._texts()])

    def _places(self, filling: int) -> Tensor:
        """(T,): a token's place in rows of the bucket's width; the filling's is the first one of a row behind all."""
        columns, index = self.packing.size[1], self.packing.index
        places = index // columns * self._row + index % columns
        return F.pad(places, (0, filling), value=self.sizes.texts * self._row)

    @property
    def _row(self) -> int:
        """Columns of the rows that tokens are laid out in: the bucket's, or behind a recording the batch's."""
        return self.sizes.width or self.packing.size[1]

    def _texts(self) -> tuple[Tensor, Tensor]:
        """(B + 1,) first tokens and (B + 2,) ends: of the batch's texts, empty ones, and the filling."""
        more = self.sizes.texts - len(self.packing.first)
        ends: Any = self.packing.ends
        first = F.pad(self.packing.first, (0, more + 1))
        return first, torch.cat([ends, ends[-1:].expand(more), torch.tensor([self.sizes.tokens])])

    def allocate(self) -> tuple[Tensor, ...]:
        """One vector."""
        return (torch.empty(len(self._vector), dtype=torch.int64, device=self.forward.device),)

    def fill(self, inputs: tuple[Tensor, ...]) -> None:
        """One copy."""
        inputs[0].copy_(self._vector, non_blocking=True)

    def run(self, *inputs: Tensor) -> Any:
        """All members on the bucket: their outputs, and where its tokens are, for `cut`."""
        tokens, texts = self.sizes.tokens, self.sizes.texts + 1
        with_types = self.rows[1] is not None
        *rows, index, first, ends = inputs[0].split([tokens] * (3 + with_types) + [texts, texts + 1])
        # No text, nor what fills up an eighth of the tokens, is longer.
        limit = min(tokens, max(self.forward.longest, tokens // STEPS))
        packing = Packing((texts, self.sizes.width), index, first, (), ends=ends, limit=limit)
        ids, *types, places = (row.unsqueeze(0) for row in rows)
        return self.forward.run_packed(packing, ids, types[0] if types else None, places), index

    def cut(self, outputs: Any) -> Any:
        """(M, 1, T, ...) of tokens -> (M, B, S, ...); else (M, B, ...), with as many columns as hold tokens."""
        texts, tokens = len(self.packing.first), len(self.packing.index)
        leaves, index = outputs
        if not self.forward.per_token:
            return cut_texts(leaves, texts, self.width, per_token=False)
        placed = Packing((texts, self._row), index[:tokens], self.packing.first, ())
        rows = self.forward.unpack_outputs(pytree.tree_map(lambda out: out[:, :, :tokens], leaves), placed)
        return pytree.tree_map(lambda out: out[:, :, : self.width], rows)


class PaddedTexts:
    """Lays out batches for whatever takes an encoder's arguments, such as its loop; see `Laid`.

    Args:
        forward: Whose arguments they are.
        run: What is recorded: (B, S) ids, mask, and token types where there are any -> outputs (M, B, ...).
        buckets: Numbers of texts, ascending; None: `BUCKETS`.
    """

    def __init__(self, forward: TextForward, run: Run, buckets: Sequence[int] | None) -> None:
        self.forward, self.run = forward, run
        self.buckets = check_buckets(BUCKETS if buckets is None else buckets)

    def __call__(self, *args: Tensor | None) -> PaddedBatch | None:
        """A batch in the next larger bucket, cut to its longest text; None if it has more texts than any."""
        given = [arg.cpu() for arg in args if arg is not None]
        bucket = find_bucket(self.buckets, len(given[0]))
        if bucket is None:
            return None
        width = int(given[1].any(0).nonzero().max()) + 1
        return PaddedBatch(self.forward, self.run, given, (bucket, self.forward.widen(width)), width)


@dataclass(frozen=True)
class PaddedBatch:
    """Texts with padding in a bucket of texts and widths; see `Laid`."""

    forward: TextForward
    recorded: Run
    args: Sequence[Tensor]
    size: tuple[int, int]
    width: int

    @property
    def key(self) -> Hashable:
        """The bucket, and how many arguments there are."""
        return (self.size, len(self.args))

    def allocate(self) -> tuple[Tensor, ...]:
        """(arguments, B, S)."""
        return (torch.empty(len(self.args), *self.size, dtype=torch.int64, device=self.forward.device),)

    def fill(self, inputs: tuple[Tensor, ...]) -> None:
        """One copy: the texts, then the first of them again and again."""
        rows, more = self.size[0] - len(self.args[0]), self.size[1] - self.width
        pads = [self.forward.padding_id, 0, 0]
        wide = [F.pad(arg[:, : self.width], (0, more), value=pad) for arg, pad in zip(self.args, pads, strict=False)]
        inputs[0].copy_(torch.stack([torch.cat([t, t[:1].expand(rows, -1)]) for t in wide]), non_blocking=True)

    def run(self, *inputs: Tensor) -> Any:
        """The run on the bucket."""
        return self.recorded(*inputs[0].unbind())

    def cut(self, outputs: Any) -> Any:
        """(M, bucket, ...) -> (M, B, ...), with as many columns as hold tokens."""
        return cut_texts(outputs, len(self.args[0]), self.width, self.forward.per_token)


def cut_texts(outputs: Any, texts: int, width: int, per_token: bool) -> Any:
    """The first texts of (M, more, ...) outputs, copied; of those that have an axis of tokens the first columns."""

    def take(output: Tensor) -> Tensor:
        output = output[:, :texts]
        has_tokens = per_token or output.dim() > 3
        return (output[:, :, :width] if has_tokens else output).clone()

    return pytree.tree_map(take, outputs)
