"""Turns a forward that may run out of memory into one that runs in chunks of the batch and of the members.

A chunk is halved at every out-of-memory error, the batch first and then the members. The size that held is
remembered, so the next batch doesn't fail first. What doesn't fit as one row of one member is refused: 507.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import OutOfMemory, first_line

logger = logging.getLogger(__name__)

Run = Callable[..., Any]
_CPU_ALLOCATOR_TEXT = "can't allocate memory"  # torch raises a plain RuntimeError for it on a CPU


class ChunkedRun:
    """Calls a forward in chunks that fit into memory.

    Args:
        run: The forward of all members: tensors (B, ...) -> tensors (M, B, ...).
        count: M.
        members_run: Makes the forward of the members from `start` to `stop`, exclusive.

    Attributes:
        safe_batch: Largest batch that is tried in one call; None as long as nothing failed.
        safe_members: As `safe_batch`, for members at a time.
        out_of_memory: How often a call ran out of memory.
    """

    def __init__(self, run: Run, count: int, members_run: Callable[[int, int], Run]) -> None:
        self.run, self.count, self._members_run = run, count, members_run
        self.safe_batch: int | None = None
        self.safe_members: int | None = None
        self.out_of_memory = 0

    def __call__(self, *args: Any) -> Any:
        """Run the batch, in chunks once it has been found not to fit.

        Raises:
            ItemError: if one row of one member runs out of memory.
        """
        batch = batch_of(args)
        while True:
            failure = None
            try:
                return self._run_chunks(args, batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
            # Outside of `except`, which would keep the failed call's tensors alive.
            self._halve(batch, failure)

    def _halve(self, batch: int, failure: str) -> None:
        self.out_of_memory += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = min(batch, self.safe_batch or batch)
        members = self.safe_members or self.count
        if rows > 1:
            self.safe_batch = rows // 2
        elif members > 1:
            self.safe_members = members // 2
        else:
            raise OutOfMemory("the model ran out of memory on a single example; send a smaller one")
        logger.warning(
            "out of memory on %d rows of %d members, now %s rows of %s members at a time: %s",
            rows,
            members,
            self.safe_batch or rows,
            self.safe_members or self.count,
            failure,
        )

    def _run_chunks(self, args: tuple[Any, ...], batch: int) -> Any:
        size = min(batch, self.safe_batch or batch)
        if size == batch:
            return self._run_members(args)
        chunks = [self._run_members(rows_of(args, batch, at, at + size)) for at in range(0, batch, size)]
        return pytree.tree_map(lambda *leaves: torch.cat(leaves, dim=1), *chunks)

    def _run_members(self, args: tuple[Any, ...]) -> Any:
        if self.safe_members is None:
            return self.run(*args)
        starts = range(0, self.count, self.safe_members)
        parts = [self._members_run(at, min(at + self.safe_members, self.count))(*args) for at in starts]
        return pytree.tree_map(lambda *leaves: torch.cat(leaves, dim=0), *parts)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR_TEXT in str(error)


def batch_of(args: tuple[Any, ...]) -> int:
    """B of the arguments: the first axis of the first tensor that has one."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else 1


def rows_of(args: tuple[Any, ...], batch: int, start: int, stop: int) -> tuple[Any, ...]:
    """Rows of every tensor that has the batch as its first axis; the rest goes to each chunk as it is."""

    def cut(leaf: Any) -> Any:
        split = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch
        return leaf[start:stop] if split else leaf

    return pytree.tree_map(cut, args)
