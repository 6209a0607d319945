"""Turns models into a server of KServe's SDK: its gRPC, probes and metrics, and our data plane behind its addresses.

The SDK reads bodies of REST with parsers of its own, which refuse what other servers of an archive answer (NaN, lists
among parameters), in words and with statuses of their own. So its addresses for predictions lead through our door;
what only the SDK reads, CloudEvents and binary tensors, goes on to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from kserve import ModelServer, model_server
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.protocol.dataplane import DataPlane
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from vmap_ensemble.frontends.door import Door
from vmap_ensemble.frontends.kserve.model import EnsembleModel, Refused
from vmap_ensemble.serving.batch import Asks

ROUTES: dict[str, Asks] = {
    "/predictions/{name}": "predict",
    "/explanations/{name}": "explain",
    "/v1/models/{name}:predict": "predict",
    "/v1/models/{name}:explain": "explain",
    "/v2/models/{name}/infer": "predict",
}
# Headers of requests that the SDK reads; `ce-` begin those of a CloudEvent.
OF_THE_SDK = INFERENCE_CONTENT_LENGTH_HEADER.lower()
CLOUD_EVENT = "application/cloudevents+json"


class ProbingDataPlane(DataPlane):
    """The SDK's, where ready means that a real prediction is answered."""

    async def ready(self) -> bool:
        """Whether all models answer."""
        return all([await model.predicts() for model in self.model_registry.get_models().values()])

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether a model answers.

        Args:
            model_name: Of those that are served.
            disable_predictor_health_check: Set where the SDK asks before a prediction: a second one would double it.

        Raises:
            ModelNotFound: There is none of this name.
        """
        model = self.get_model_from_registry(model_name)
        return bool(model.ready) if disable_predictor_health_check else await model.predicts()


def serve(models: Sequence[EnsembleModel], most_bytes: int) -> None:
    """Serve until a signal ends it; ports and more are the SDK's own options, which it reads off the command line.

    Args:
        models: Loaded.
        most_bytes: Of a body over REST.
    """
    server = ModelServer()
    server.dataplane = ProbingDataPlane(server.registered_models)
    add_routes(model_server.app, {model.name: model for model in models}, most_bytes)
    server.start(list(models))


def add_routes(app: FastAPI, models: Mapping[str, EnsembleModel], most_bytes: int) -> None:
    """Our addresses, before those that the SDK adds."""
    door = Door({name: model.answer for name, model in models.items()}, most_bytes)
    for path, asks in ROUTES.items():
        app.router.routes.append(_OurRoute(path, partial(_take, door, asks)))
    app.add_exception_handler(Refused, _refuse)


class _OurRoute(Route):
    """A route of all methods, which our door tells apart; it leaves to the SDK what only the SDK reads."""

    def __init__(self, path: str, take: Callable[[Request], Awaitable[Response]]) -> None:
        super().__init__(path, take)
        self.methods = None

    def matches(self, scope: MutableMapping[str, Any]) -> tuple[Match, MutableMapping[str, Any]]:
        found, child = super().matches(scope)
        if found is Match.NONE or not _is_for_the_sdk(Request(scope).headers):
            return found, child
        return Match.NONE, {}


def _is_for_the_sdk(headers: Mapping[str, str]) -> bool:
    names = {name.lower() for name in headers}
    return "ce-id" in names or OF_THE_SDK in names or headers.get("content-type") == CLOUD_EVENT


async def _take(door: Door, asks: Asks, request: Request) -> Response:
    return await door.take(request, asks, request.path_params["name"])


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return Response(error.reply.text, error.reply.status, media_type="application/json")
