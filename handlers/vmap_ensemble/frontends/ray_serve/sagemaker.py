"""Turns SageMaker's two addresses into requests of the one model that is served: POST /invocations and GET /ping.

AWS's images for Ray Serve answer both in a process of their own, which posts what comes to `/`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from vmap_ensemble.errors import where
from vmap_ensemble.frontends.door import Ask, Door, path_of
from vmap_ensemble.serving.batch import Asks

logger = logging.getLogger(__name__)

INVOKED = ("", "/", "/invocations")
# The only header of a client that SageMaker hands on besides the types, and what it may ask for instead.
CUSTOM = "x-amzn-sagemaker-custom-attributes"
ASKED: dict[str, Asks] = {"explain": "explain", "describe": "describe"}


class SageMakerDoor(Door):
    """The door of a single archive, with SageMaker's addresses beside its own.

    Args:
        name: The model's.
        ask: Who answers for it.
        most_bytes: Of a request's body.
        check: Raises where no prediction would be answered.
    """

    def __init__(self, name: str, ask: Ask, most_bytes: int, check: Callable[[], Awaitable[None]]) -> None:
        super().__init__({name: ask}, most_bytes)
        self._name, self._check = name, check

    async def __call__(self, request: Request) -> Response:
        """One request, one response."""
        path = path_of(request.scope)
        if path == "/ping":
            return await self._ping()
        if path in INVOKED:
            return await self.take(request, ASKED.get(request.headers.get(CUSTOM, ""), "predict"), self._name)
        return await super().__call__(request)

    async def _ping(self) -> Response:
        """200 with an empty body where the sample input is answered now."""
        try:
            await self._check()
        except Exception as error:
            logger.error("the sample input isn't answered: %s", where(error))
            return Response(status_code=503)
        return Response(status_code=200)
