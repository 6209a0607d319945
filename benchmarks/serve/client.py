"""A plan of load -> latencies, in a process of its own: JSON on stdin, JSON on stdout; the standard library alone.

Closed loop: each of C clients sends its next request when the last one is answered. Open loop: requests arrive at a
rate whatever the server does (Poisson), and a latency counts from the moment of arrival, so that a queue in the
client is not overlooked. A request goes to all paths of the plan at once and is complete when all have answered.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
LONGEST_ANSWER = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What is sent, where, and how often.

    Attributes:
        host, port: of the server.
        paths: each request is posted to all of them.
        bodies: base64 of the bodies, sent in turns.
        clients: of a closed loop; ignored with a rate.
        rate: arrivals a second of an open loop; None is a closed loop.
        warmup_s, seconds, rounds: load that isn't counted, then so many rounds of so many seconds.
        timeout_s: of one request.
    """

    host: str
    port: int
    paths: list[str]
    bodies: list[str]
    clients: int = 8
    rate: float | None = None
    warmup_s: float = 2.0
    seconds: float = 5.0
    rounds: int = 3
    timeout_s: float = 10.0


@dataclass
class Round:
    """What one round gave.

    Attributes:
        latencies_ms: of the requests that all paths answered with 200.
        in_time: how many of them were answered within the length of the round; rates are of these.
        errors: status, or type of an error -> requests.
        seconds: until the last answer.
        cpu_s: processor time of this client.
    """

    latencies_ms: list[float] = field(default_factory=list)
    in_time: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_s: float = 0.0


class StatusError(Exception):
    """A path answered with another status than 200."""


class Connection:
    """One connection that is kept alive; HTTP/1.1 with a length, which is all that TorchServe answers with."""

    def __init__(self, plan: Plan, path: str) -> None:
        self.plan = plan
        self.head = f"POST {path} HTTP/1.1\r\nHost: {plan.host}:{plan.port}\r\nContent-Type: application/octet-stream"
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> Any:
        """Send one body and return the parsed JSON of its answer."""
        try:
            status, answer = await asyncio.wait_for(self._exchange(body), self.plan.timeout_s)
        except BaseException:
            self.close()
            raise
        if status != 200:
            raise StatusError(str(status))
        return json.loads(answer)

    async def _exchange(self, body: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.plan.host, self.plan.port, limit=LONGEST_ANSWER)
        reader, writer = self.streams
        writer.write(f"{self.head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if length is None:
            raise ValueError("an answer without a length")
        return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length.group(1)))

    def close(self) -> None:
        """Drop the connection; the next request makes another."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


class Client:
    """One connection per path; asks all paths at once and averages what they answer."""

    def __init__(self, plan: Plan) -> None:
        self.connections = [Connection(plan, path) for path in plan.paths]

    async def ask(self, body: bytes) -> Any:
        """Returns the one answer, or the mean of several {class: probability}."""
        if len(self.connections) == 1:
            return await self.connections[0].post(body)
        posts = (connection.post(body) for connection in self.connections)
        # All are waited for, also when one fails: a connection carries one request at a time.
        replies = await asyncio.gather(*posts, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        answers: list[Any] = list(replies)
        return {label: sum(answer[label] for answer in answers) / len(answers) for label in answers[0]}

    async def timed(self, body: bytes, start: float, end: float, into: Round) -> None:
        """Ask, and note the latency since `start` and whether it was before `end`, or the error."""
        try:
            await self.ask(body)
        except (StatusError, OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
            reason = str(error) if isinstance(error, StatusError) else type(error).__name__
            into.errors[reason] = into.errors.get(reason, 0) + 1
        else:
            now = time.perf_counter()
            into.latencies_ms.append((now - start) * 1e3)
            into.in_time += now <= end

    def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            connection.close()


async def run_closed(clients: Sequence[Client], bodies: Iterator[bytes], seconds: float) -> Round:
    """One round in which every client sends its next request when the last one is answered."""
    round_ = Round()
    begin, cpu = time.perf_counter(), time.process_time()

    async def send(client: Client) -> None:
        while (start := time.perf_counter()) - begin < seconds:
            await client.timed(next(bodies), start, begin + seconds, round_)

    await asyncio.gather(*(send(client) for client in clients))
    round_.seconds, round_.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return round_


async def run_open(plan: Plan, idle: list[Client], bodies: Iterator[bytes], seconds: float, seed: int) -> Round:
    """One round in which requests arrive at plan.rate, each on a client that has nothing else to do."""
    round_ = Round()
    begin, cpu = time.perf_counter(), time.process_time()

    async def send(body: bytes, start: float) -> None:
        client = idle.pop() if idle else Client(plan)
        await client.timed(body, start, begin + seconds, round_)
        idle.append(client)

    tasks = []
    for arrival in arrivals(plan.rate or 0.0, seconds, seed):
        await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
        tasks.append(asyncio.create_task(send(next(bodies), begin + arrival)))
    await asyncio.gather(*tasks)
    round_.seconds, round_.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return round_


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Seconds of a Poisson process's arrivals: the gaps are exponential with mean 1/rate."""
    generator = random.Random(seed)
    now = generator.expovariate(rate)
    while now < seconds:
        yield now
        now += generator.expovariate(rate)


async def run(plan: Plan) -> list[Round]:
    """Warm up, then run the counted rounds one after another on the same connections."""
    bodies = itertools.cycle([base64.b64decode(body) for body in plan.bodies])
    clients = [Client(plan) for _ in range(1 if plan.rate else plan.clients)]
    rounds = []
    for number in range(plan.rounds + 1):
        seconds = plan.seconds if number else plan.warmup_s
        if plan.rate:
            rounds.append(await run_open(plan, clients, bodies, seconds, seed=number))
        else:
            rounds.append(await run_closed(clients, bodies, seconds))
    for client in clients:
        client.close()
    return rounds[1:]


def main() -> None:
    """Read the plan, run it, write the rounds."""
    plan = Plan(**json.load(sys.stdin))
    json.dump([asdict(round_) for round_ in asyncio.run(run(plan))], sys.stdout)


if __name__ == "__main__":
    main()
