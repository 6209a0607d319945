"""Turns a Starlette request into what the model that it names is asked, and that model's reply into a response."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vmap_ensemble.errors import RequestError, where
from vmap_ensemble.serving.batch import Asks, Incoming, Record, Reply, refusal
from vmap_ensemble.serving.multipart import read_fields
from vmap_ensemble.serving.statuses import reason_of

logger = logging.getLogger(__name__)

ROUTES: dict[str, Asks] = {"predictions": "predict", "explanations": "explain"}
# `curl -T` puts.
METHODS = ("POST", "PUT")


@dataclass(frozen=True)
class Taken:
    """A request whose body isn't read yet: bytes travel between processes, JSON nested a thousand times doesn't.

    Attributes:
        body: As it was sent.
        headers: By names in lower case.
        asks: As of `Incoming`.
    """

    body: bytes
    headers: dict[str, str]
    asks: Asks


Ask = Callable[[Taken], Awaitable[Reply]]
Route = Callable[[Mapping[str, Any]], tuple[Asks, str]]


def open_taken(taken: Taken, record: Record) -> Incoming | Reply:
    """A request with its body read; or the reply that says why it can't be.

    Args:
        taken: What came through a door.
        record: Told of a refusal, as `answer_batch` tells it.
    """
    try:
        return Incoming(*read_fields(taken.body, taken.headers), taken.asks)
    except RequestError as error:
        record("EnsembleRefusedRequests", 1, str(error.status), reason_of(error.status))
        return refusal(error.status, error.message)


class Door:
    """Answers requests of models, and refuses what is none. As an endpoint: /predictions/NAME and /explanations/NAME.

    Args:
        models: Name -> who answers for it.
        most_bytes: Of a request's body.
    """

    def __init__(self, models: Mapping[str, Ask], most_bytes: int) -> None:
        self._models, self._most_bytes = models, most_bytes

    async def __call__(self, request: Request) -> Response:
        """One request, one response."""
        return await self._respond(request, _route)

    async def take(self, request: Request, asks: Asks, name: str) -> Response:
        """A request that came by another address, of which it is known what it asks of which model."""
        return await self._respond(request, lambda _scope: (asks, name))

    async def _respond(self, request: Request, route: Route) -> Response:
        """Each refusal has the same JSON."""
        try:
            reply = await self._answer(request, *route(request.scope))
        except RequestError as error:
            reply = refusal(error.status, error.message)
        except ClientDisconnect:
            reply = refusal(400, "the body didn't come whole")
        except Exception as error:
            logger.error("a request failed: %s", where(error))
            reply = refusal(500, "this request could not be answered")
        headers = {"Allow": ", ".join(METHODS)} if reply.status == 405 else None
        return Response(reply.text, reply.status, headers, media_type="application/json")

    async def _answer(self, request: Request, asks: Asks, name: str) -> Reply:
        if name not in self._models:
            raise RequestError(404, "no model of this name is served here")
        if request.method not in METHODS:
            raise RequestError(405, f"expected {' or '.join(METHODS)}, got {request.method[:20]}")
        # The last of two headers of one name counts, as with TorchServe.
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in request.headers.raw}
        body = await self._read(request, headers.get("content-length", ""))
        describes = headers.get("describe") == "True"  # as TorchServe's header
        return await self._models[name](Taken(body, headers, "describe" if describes else asks))

    async def _read(self, request: Request, length: str) -> bytes:
        """The body, of which no more is kept than is allowed."""
        body = bytearray()
        if not (length.isdigit() and int(length) > self._most_bytes):
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._most_bytes:
                    break
            else:
                return bytes(body)
        raise RequestError(413, f"the body is larger than {self._most_bytes} bytes")


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request below where the application stands."""
    return str(scope["path"]).removeprefix(str(scope.get("root_path", "")))


def _route(scope: Mapping[str, Any]) -> tuple[Asks, str]:
    """What a path asks, and of which model."""
    kind, _, name = path_of(scope).removeprefix("/").partition("/")
    if kind not in ROUTES or not name:
        raise RequestError(404, f"no such address; expected {' or '.join(f'/{route}/NAME' for route in ROUTES)}")
    return ROUTES[kind], name
