"""Turns items into requests of a server over HTTP, and its replies into predictions; tries again where that helps."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import httpx

from vmap_ensemble.client.answers import Item, Prediction, Refused, body_of, options_of, predictions_of, read_answer

# Seconds before the second try; doubled each time, and up to twice as long, so that clients don't come all at once.
FIRST_PAUSE_S = 0.1
HEADERS = {"detail": "X-Ensemble-Detail", "subset": "X-Ensemble-Subset", "top_k": "X-Ensemble-Top-K"}


class _Asking:
    """What both clients are made of: what they send, and which replies are worth another try; see `Client`."""

    _kind: type[httpx.Client] | type[httpx.AsyncClient]

    def __init__(
        self,
        url: str,
        name: str,
        *,
        key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        **options: Any,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http: Any = self._kind(base_url=url, headers=headers, timeout=timeout_s, **options)
        self.name, self.retries = name, retries

    def _request(
        self,
        asks: str,
        item: Item | Sequence[Item],
        detail: bool = False,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> dict[str, Any]:
        """Keywords of httpx's `post`."""
        content, kind = body_of(item)
        options = {HEADERS[key]: value for key, value in options_of(detail, subset, top_k).items()}
        return {"url": f"/{asks}/{self.name}", "content": content, "headers": {"Content-Type": kind, **options}}

    def _pauses(self) -> Iterator[float | None]:
        """Seconds to wait before each next try; None behind the last."""
        pause = FIRST_PAUSE_S
        for _ in range(self.retries):
            yield pause * (1 + random.random())
            pause *= 2
        yield None

    @staticmethod
    def _is_worth_another(reply: httpx.Response | httpx.TransportError) -> bool:
        """A full queue, a worker that starts again, a lost connection: not a refusal, nor a time that is up."""
        if isinstance(reply, httpx.Response):
            return reply.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        return isinstance(reply, httpx.NetworkError | httpx.RemoteProtocolError)

    @staticmethod
    def _finish(reply: httpx.Response | httpx.TransportError) -> Any:
        """The answer's JSON.

        Raises:
            Refused: There is none.
        """
        if isinstance(reply, httpx.Response):
            return read_answer(reply.status_code, reply.text)
        raise Refused(0, f"{type(reply).__name__}: {reply or 'no answer'}") from reply


class Client(_Asking):
    """Asks one model of a server.

    Args:
        url: Where predictions are answered, such as `http://127.0.0.1:8080`.
        name: What the model is registered as; `ens/2.0` asks one version.
        key: Sent as `Authorization: Bearer`, where the server wants one.
        timeout_s: For each try, from connecting to the whole answer's parts.
        retries: Further tries after a 503 or a connection that failed.
        options: Further arguments of httpx.Client, such as `verify`.

    Raises:
        Refused: By each method, for a request that gets no answer.

    Example:
        >>> with Client("http://127.0.0.1:8080", "ens") as client:
        ...     answer = client.predict(Path("cat.jpg"), detail=True)
        >>> answer.label, answer.probability, answer.mutual_information
    """

    _kind = httpx.Client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        item: Item | Sequence[Item],
        *,
        detail: bool = False,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Any:
        """Ask for one item, or for a list of them as one request.

        Args:
            item: A path or the bytes of a file, a text, an object of keys; or a list of these.
            detail: Whether the answer tells what each member says.
            subset: Names of the members that are asked.
            top_k: Number of labels.

        Returns:
            A Prediction, or a list of them for a list.
        """
        return predictions_of(self._ask(self._request("predictions", item, detail, subset, top_k)))

    def explain(self, item: Item, *, subset: Sequence[str] | None = None) -> dict[str, Any]:
        """What each part of an item adds to the answer to it: the server's JSON."""
        found: dict[str, Any] = self._ask(self._request("explanations", item, subset=subset))
        return found

    def predict_batch(
        self, items: Sequence[Item], *, concurrency: int = 16, **options: Any
    ) -> list[Prediction | Refused]:
        """Ask for many items, a request each, several at a time: those that wait share the server's forwards.

        Args:
            items: As of `predict`.
            concurrency: Requests at a time, at least the server's batchSize to fill its batches.
            options: As of `predict`.

        Returns:
            A Prediction each, in order; the error in place of one that was refused.
        """

        def ask(item: Item) -> Prediction | Refused:
            try:
                found: Prediction = self.predict(item, **options)
                return found
            except Refused as error:
                return error

        with ThreadPoolExecutor(max(1, concurrency)) as pool:
            return list(pool.map(ask, items))

    def _ask(self, request: dict[str, Any]) -> Any:
        for pause in self._pauses():
            reply: httpx.Response | httpx.TransportError
            try:
                reply = self._http.post(**request)
            except httpx.TransportError as error:
                reply = error
            if pause is None or not self._is_worth_another(reply):
                break
            time.sleep(pause)
        return self._finish(reply)


class AsyncClient(_Asking):
    """As `Client`, for code that awaits; the arguments are the same."""

    _kind = httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(
        self,
        item: Item | Sequence[Item],
        *,
        detail: bool = False,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Any:
        """As `Client.predict`."""
        return predictions_of(await self._ask(self._request("predictions", item, detail, subset, top_k)))

    async def explain(self, item: Item, *, subset: Sequence[str] | None = None) -> dict[str, Any]:
        """As `Client.explain`."""
        found: dict[str, Any] = await self._ask(self._request("explanations", item, subset=subset))
        return found

    async def predict_batch(
        self, items: Sequence[Item], *, concurrency: int = 16, **options: Any
    ) -> list[Prediction | Refused]:
        """As `Client.predict_batch`."""
        free = asyncio.Semaphore(max(1, concurrency))

        async def ask(item: Item) -> Prediction | Refused:
            async with free:
                try:
                    found: Prediction = await self.predict(item, **options)
                    return found
                except Refused as error:
                    return error

        return list(await asyncio.gather(*map(ask, items)))

    async def _ask(self, request: dict[str, Any]) -> Any:
        for pause in self._pauses():
            reply: httpx.Response | httpx.TransportError
            try:
                reply = await self._http.post(**request)
            except httpx.TransportError as error:
                reply = error
            if pause is None or not self._is_worth_another(reply):
                break
            await asyncio.sleep(pause)
        return self._finish(reply)
