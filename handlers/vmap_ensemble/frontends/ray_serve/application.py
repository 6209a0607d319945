"""Turns arguments (which archives, in which batches) into an application of Ray Serve.

One archive is a deployment that answers HTTP itself. Several are a deployment each, behind one that reads requests
and hands them on, so that each has replicas, resources and batches of its own.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from vmap_ensemble.errors import RequestError
from vmap_ensemble.frontends.door import Ask, Door, Taken
from vmap_ensemble.frontends.ray_serve.replica import Served
from vmap_ensemble.frontends.ray_serve.settings import (
    ApplicationSettings,
    ModelSettings,
    deployment_name,
    read_application,
)
from vmap_ensemble.serving.batch import Reply

# No name of a model begins like that.
ENTRANCE = "_entrance"
# Requests that the entrance holds at a time; how many wait for a model is that model's own limit.
MOST_AT_THE_ENTRANCE = 1000


def app(args: dict[str, Any]) -> Application:
    """The application that `serve run` and `serve deploy` build.

    Args:
        args: See `read_application`.

    Raises:
        SettingsError: A key or value is wrong.
    """
    read = read_application(args)
    bound = {name: _bind(name, model, read) for name, model in read.models.items()}
    if len(bound) == 1:
        return next(iter(bound.values()))
    deploy = serve.deployment(
        name=ENTRANCE, max_ongoing_requests=MOST_AT_THE_ENTRANCE, ray_actor_options={"num_cpus": 0}
    )
    return deploy(Entrance).bind(bound, read.max_request_bytes)


def _bind(name: str, model: ModelSettings, read: ApplicationSettings) -> Application:
    # While one batch is run the next one must be able to gather: Ray's own limit of 5 would be the batch's.
    deploy = serve.deployment(name=deployment_name(name), max_ongoing_requests=2 * model.batch_size, user_config={})
    return deploy(Served).bind(name, model, read.max_request_bytes, read.invocations)


class Entrance:
    """Reads requests for several models, and hands each to a replica of the one that it names.

    Args:
        models: Name -> its deployment.
        most_bytes: Of a request's body.
    """

    def __init__(self, models: dict[str, DeploymentHandle], most_bytes: int) -> None:
        self._door = Door({name: _asking(handle) for name, handle in models.items()}, most_bytes)

    async def __call__(self, request: Request) -> Response:
        """A request over HTTP."""
        return await self._door(request)


def _asking(handle: DeploymentHandle) -> Ask:
    async def ask(taken: Taken) -> Reply:
        try:
            reply: Reply = await handle.answer.remote(taken)
            return reply
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            raise RequestError(503, "the model can't answer now; try again") from None

    return ask
