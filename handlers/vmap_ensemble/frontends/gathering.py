"""Turns requests that wait for one another into batches, where a server has no batching of its own.

While one batch is answered the next one gathers; a request that comes to an idle model waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vmap_ensemble.serving.batch import Incoming, Reply

Result = TypeVar("Result")


class Gathering:
    """The requests of one model.

    Args:
        answer: A batch -> its replies, in order.
        most: Requests in a batch.
    """

    def __init__(self, answer: Callable[[list[Incoming]], Sequence[Reply]], most: int) -> None:
        self._answer, self._most = answer, most
        self._waiting: list[tuple[Incoming, asyncio.Future[Reply]]] = []
        self._work: asyncio.Task[None] | None = None
        # One thread for all that torch does: it has the threads that were set and measured with, and the loop stays
        # free to read what comes in meanwhile.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ensemble")

    async def ask(self, incoming: Incoming) -> Reply:
        """The reply to one request, which shares a batch with those that wait beside it."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((incoming, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._answer_all())
        return await future

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call something in the thread of the forwards, between two of them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _answer_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            outcomes: Sequence[Reply | Exception]
            try:
                outcomes = await self.run(self._answer, [incoming for incoming, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future.done():
                    continue  # whoever asked has gone
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
