"""Turns batches of texts of any length into the static inputs of recordings, one for each bucket of sizes.

    PackedTexts   (B, S) ids and mask -> T real tokens, filled up to a bucket of tokens: the filling is one more text
    PaddedTexts   (B, S) ids and mask -> a bucket of texts as long as the longest: for members one after another

Everything is laid out on the host, as one vector of integers that goes to the device in one copy: nothing between it
and the outputs waits for the device. What a bucket doesn't fix, such as where each text ends, is read on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.encoders.packing import Packing, check_lengths
from vmap_ensemble.execution.cuda.graphs import BUCKETS, check_buckets, find_bucket
from vmap_ensemble.execution.timing import Run

Array = npt.NDArray[np.int64]
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

    def count_positions(self, input_ids: Tensor) -> Tensor:
        """Position ids (B, S) of ids (B, S)."""

    def run_packed(self, packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor) -> Any:
        """Run all members on packed rows; outputs per token stay packed."""

    def unpack_outputs(self, outputs: Any, packing: Packing) -> Any:
        """Outputs per token of a packed row, (M, 1, T, ...) -> (M, B, S, ...)."""


# Packing, ids, token types or None, and position ids of all tokens, (1, T) each -> outputs, per token still packed.
RunPacked = Callable[[Packing, Tensor, Tensor | None, Tensor], Any]


class PackedTexts:
    """Lays out batches for a forward that computes no padding; see `Laid`.

    Args:
        forward: What is recorded.
        buckets: Numbers of texts, ascending; None: few, or `BUCKETS` where rows have a width.
        run: Runs all members on packed rows; by default the forward's `run_packed`.
    """

    def __init__(self, forward: StaticForward, buckets: Sequence[int] | None, run: RunPacked | None = None) -> None:
        self.forward, self.needs_width = forward, forward.needs_width
        self.run = forward.run_packed if run is None else run
        few = BUCKETS if self.needs_width else PACKED_BUCKETS
        self.buckets = check_buckets(few if buckets is None else buckets)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> PackedBatch | None:
        """A batch in the next larger bucket; None if it has more texts than any.

        Raises:
            ItemError: A text has no token.
        """
        texts = find_bucket(self.buckets, len(input_ids))
        if texts is None:
            return None
        found = find_tokens(attention_mask.cpu().numpy())
        ids = input_ids.cpu()
        given = (ids, token_type_ids, self.forward.count_positions(ids))
        rows = [tensor.cpu().numpy().reshape(-1)[found.index] for tensor in given if tensor is not None]
        width = round_up(found.width) if self.needs_width else 0
        return PackedBatch(self.forward, self.run, found, rows, Sizes(round_up(len(found.index)), texts, width))


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a batch are; arrays of numpy, whose small operators take a tenth of torch's time.

    Attributes:
        columns: S of the padded batch.
        width: How many of them hold tokens.
        index: (T,) places of the tokens in the flattened batch, text by text.
        lengths: (B,) tokens of each text.
    """

    columns: int
    width: int
    index: Array
    lengths: Array


def find_tokens(mask: Array) -> Tokens:
    """Find the tokens of a mask (B, S).

    Raises:
        ItemError: A text has none.
    """
    lengths = np.count_nonzero(mask, axis=1)
    check_lengths(lengths.tolist())
    index = np.flatnonzero(mask)
    return Tokens(mask.shape[1], int((index % mask.shape[1]).max()) + 1, index, lengths)


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
        forward: Whose texts they are.
        run_packed: What is recorded.
        found: Where the tokens of the batch are.
        rows: Ids, token types if there are any, and position ids of its tokens, (T,) each.
        sizes: Of the bucket.
    """

    forward: StaticForward
    run_packed: RunPacked
    found: Tokens
    rows: Sequence[Array]
    sizes: Sizes

    @property
    def key(self) -> Hashable:
        """The bucket, and how many rows there are."""
        return (self.sizes, len(self.rows))

    @property
    def lengths(self) -> list[int]:
        """Of the parts of the vector: rows; places in the padded batch; first tokens and ends of all texts."""
        texts = self.sizes.texts + 1
        return [self.sizes.tokens] * (len(self.rows) + 1) + [texts, texts + 1]

    @property
    def row(self) -> int:
        """Columns of the rows that tokens are laid out in: the bucket's, or behind a recording the batch's."""
        return self.sizes.width or self.found.columns

    def lay_out(self) -> Array:
        """The vector: what no token of the batch fills is 0, but for the filling's place and the ends behind it."""
        ends_of = list(itertools.accumulate(self.lengths))
        vector = np.zeros(ends_of[-1], dtype=np.int64)
        *rows, places, first, ends = (
            vector[end - length : end] for end, length in zip(ends_of, self.lengths, strict=True)
        )
        tokens, texts, columns = len(self.found.index), len(self.found.lengths), self.found.columns
        for part, own in zip(rows, self.rows, strict=True):
            part[:tokens] = own
        places[:tokens] = self.found.index // columns * self.row + self.found.index % columns
        places[tokens:] = self.sizes.texts * self.row  # the first one of a row behind all
        np.cumsum(self.found.lengths, out=ends[1 : texts + 1])
        first[:texts] = ends[:texts]
        ends[texts + 1 : -1], ends[-1] = tokens, self.sizes.tokens
        return vector

    def allocate(self) -> tuple[Tensor, ...]:
        """One vector."""
        return (torch.empty(sum(self.lengths), dtype=torch.int64, device=self.forward.device),)

    def fill(self, inputs: tuple[Tensor, ...]) -> None:
        """One copy."""
        inputs[0].copy_(torch.from_numpy(self.lay_out()), non_blocking=True)

    def run(self, *inputs: Tensor) -> Any:
        """All members on the bucket: their outputs, and where its tokens are, for `cut`."""
        *rows, index, first, ends = inputs[0].split(self.lengths)
        # No text, nor what fills up an eighth of the tokens, is longer.
        limit = min(self.sizes.tokens, max(self.forward.longest, self.sizes.tokens // STEPS))
        packing = Packing((self.sizes.texts + 1, self.sizes.width), index, first, (), ends=ends, limit=limit)
        ids, *types, places = (row.unsqueeze(0) for row in rows)
        return self.run_packed(packing, ids, types[0] if types else None, places), index

    def cut(self, outputs: Any) -> Any:
        """(M, 1, T, ...) of tokens -> (M, B, S, ...); else (M, B, ...), with as many columns as hold tokens."""
        texts, tokens, width = len(self.found.lengths), len(self.found.index), self.found.width
        leaves, index = outputs
        if not self.forward.per_token:
            return cut_texts(leaves, texts, width, per_token=False)
        placed = Packing((texts, self.row), index[:tokens], index, ())
        rows = self.forward.unpack_outputs(pytree.tree_map(lambda out: out[:, :, :tokens], leaves), placed)
        return pytree.tree_map(lambda out: out[:, :, :width], rows)


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
