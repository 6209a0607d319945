"""Requests that wait for one another: which share a batch, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vmap_ensemble.frontends.gathering import Gathering
from vmap_ensemble.serving.batch import Incoming, Reply


def incoming(number: int) -> Incoming:
    return Incoming({"body": number}, {})


def test_who_comes_during_a_batch_shares_the_next_one() -> None:
    sizes, started, going_on = [], threading.Event(), threading.Event()

    def answer(batch: list[Incoming]) -> list[Reply]:
        sizes.append(len(batch))
        started.set()
        going_on.wait(10)
        return [Reply(200, str(one.fields["body"])) for one in batch]

    async def ask() -> list[Reply]:
        gathering = Gathering(answer, most=3)
        first = asyncio.create_task(gathering.ask(incoming(0)))
        await asyncio.to_thread(started.wait, 10)
        others = [asyncio.create_task(gathering.ask(incoming(number))) for number in range(1, 6)]
        await asyncio.sleep(0)  # all of them are waiting
        others[1].cancel()
        going_on.set()
        replies = await asyncio.gather(first, *others, return_exceptions=True)
        assert isinstance(replies.pop(2), asyncio.CancelledError)
        return replies

    assert [reply.text for reply in asyncio.run(ask())] == ["0", "1", "3", "4", "5"]
    assert sizes == [1, 3, 2]


def test_a_batch_that_raises_reaches_those_who_asked_and_the_next_is_answered() -> None:
    def answer(batch: list[Incoming]) -> list[Reply]:
        if batch[0].fields["body"] < 0:
            raise RuntimeError("no batch")
        return [Reply(200, "")] * len(batch)

    async def ask() -> None:
        gathering = Gathering(answer, most=2)
        with pytest.raises(RuntimeError, match="no batch"):
            await gathering.ask(incoming(-1))
        assert (await gathering.ask(incoming(1))).status == 200

    asyncio.run(ask())
