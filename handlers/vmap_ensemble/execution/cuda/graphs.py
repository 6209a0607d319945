"""Turns a forward into recordings of it, one for each bucket of sizes: no launch costs, no Python.

A recording replays fixed addresses, so a batch is laid out in static inputs of the next larger bucket, and what fills
the bucket is cut off the outputs. How that is done for one batch is a `Laid`; `BatchRows` does it for tensors
(B, ...), whose padding is their own first row: a row that the model is known to take.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cuda.recorder import Recorder, Recording
from vmap_ensemble.execution.timing import Run

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MAX_GRAPHS = 32
Inputs = tuple[Tensor, ...]


class Laid(Protocol):
    """One batch, laid out for a recording."""

    @property
    def key(self) -> Hashable:
        """Names the bucket: batches of one key are served by one recording."""

    def allocate(self) -> Inputs:
        """Static inputs of the bucket, on the device."""

    def fill(self, inputs: Inputs) -> None:
        """Copy the batch into them, and fill up the rest."""

    def run(self, *inputs: Tensor) -> Any:
        """What is recorded: the forward on a bucket; asks nothing of the batch that the key doesn't say."""

    def cut(self, outputs: Any) -> Any:
        """The batch's part of the outputs, copied: the next replay overwrites them."""


LayOut = Callable[..., Laid | None]


class Recorded:
    """A forward, replayed from recordings that are made at the first batch of their bucket.

    Args:
        lay_out: A batch's arguments -> the batch laid out; None if it is too large for any bucket.
        plain: Runs such a batch.
        recorder: Of the members' device.

    Note:
        Each recording keeps its own inputs and outputs; the one that was used least recently goes first. Where the
        first bucket can't be recorded that is an error; a later one then runs without, which is logged once.

    Attributes:
        refused: Buckets that can't be recorded.
    """

    def __init__(self, lay_out: LayOut, plain: Run, recorder: Recorder) -> None:
        self.lay_out, self.plain, self.recorder = lay_out, plain, recorder
        self.refused: set[Hashable] = set()
        self._kept: OrderedDict[Hashable, tuple[Inputs, Recording]] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, *args: Any) -> Any:
        """Run a batch: arguments and outputs as the plain forward's."""
        laid = self.lay_out(*args)
        kept = None if laid is None else self._find(laid)
        if laid is None or kept is None:
            return self.plain(*args)
        inputs, recording = kept
        laid.fill(inputs)
        recording.replay()
        return laid.cut(recording.outputs)

    def _find(self, laid: Laid) -> tuple[Inputs, Recording] | None:
        """The recording of a batch's bucket, made where there is none yet; None if it can't be."""
        if laid.key in self.refused:
            return None
        if laid.key not in self._kept:
            try:
                self._kept[laid.key] = self._record(laid)
            except LoadError as error:
                if not self._kept:  # nothing has ever been recorded: whoever chose this mode wants to know
                    raise
                self.refused.add(laid.key)
                logger.warning("batches of %s run without a recording: %s", laid.key, error)
                return None
            if len(self._kept) > MAX_GRAPHS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(laid.key)
        return self._kept[laid.key]

    def _record(self, laid: Laid) -> tuple[Inputs, Recording]:
        inputs = laid.allocate()
        laid.fill(inputs)
        return inputs, self.recorder.record(lambda: laid.run(*inputs))


class BatchRows:
    """Lays out batches of tensors (B, ...) in buckets of batch sizes.

    Args:
        run: Tensors (B, ...) -> tensors (M, B, ...).
        device: Where the members are.
        buckets: Batch sizes, ascending; None: `BUCKETS`.
        channels_last: Whether images are laid out in this memory format.

    Raises:
        LoadError: The buckets aren't ascending sizes from 1.
    """

    def __init__(
        self, run: Run, device: torch.device, buckets: Sequence[int] | None = None, channels_last: bool = False
    ) -> None:
        self.run, self.device, self.channels_last = run, device, channels_last
        self.buckets = check_buckets(BUCKETS if buckets is None else buckets)

    def __call__(self, *args: Tensor) -> Rows | None:
        """A batch in the next larger bucket; None if there is none."""
        bucket = find_bucket(self.buckets, args[0].shape[0])
        return None if bucket is None else Rows(self, bucket, args)


@dataclass(frozen=True)
class Rows:
    """Tensors (B, ...) in a bucket of batch sizes; see `Laid`."""

    lay_out: BatchRows
    bucket: int
    args: Inputs

    @property
    def key(self) -> Hashable:
        """The bucket, and the sizes and dtypes of a row."""
        return (self.bucket, *((tuple(arg.shape[1:]), arg.dtype) for arg in self.args))

    def allocate(self) -> Inputs:
        """(bucket, ...) each, on the members' device."""
        return tuple(self._allocate(arg) for arg in self.args)

    def _allocate(self, arg: Tensor) -> Tensor:
        images = self.lay_out.channels_last and arg.dim() == 4
        format_ = torch.channels_last if images else torch.contiguous_format
        size = (self.bucket, *arg.shape[1:])
        return torch.empty(size, dtype=arg.dtype, device=self.lay_out.device, memory_format=format_)

    def fill(self, inputs: Inputs) -> None:
        """The batch, then its first row again and again."""
        for static, arg in zip(inputs, self.args, strict=True):
            fill_static(static, arg)

    def run(self, *inputs: Tensor) -> Any:
        """The forward."""
        return self.lay_out.run(*inputs)

    def cut(self, outputs: Any) -> Any:
        """(M, bucket, ...) -> (M, B, ...)."""
        batch = self.args[0].shape[0]
        return pytree.tree_map(lambda out: out[:, :batch].clone(), outputs)


def find_bucket(buckets: Sequence[int], size: int) -> int | None:
    """The smallest bucket that holds so many; None if none does."""
    return next((bucket for bucket in buckets if bucket >= size), None)


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """Refuse sizes that aren't ascending from 1.

    Raises:
        LoadError: Names them.
    """
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise LoadError(f"buckets of a recording: expected ascending batch sizes from 1, got {list(buckets)}")
    return tuple(buckets)


def fill_static(static: Tensor, arg: Tensor) -> None:
    """Copy a batch into a static input of at least its size; the rows behind it become its first row."""
    batch = arg.shape[0]
    static[:batch].copy_(arg, non_blocking=True)
    if batch < static.shape[0]:
        static[batch:].copy_(arg[:1].expand(static.shape[0] - batch, *arg.shape[1:]), non_blocking=True)
