"""Turns an archive into a replica of a Ray Serve deployment: requests that wait for each other share one forward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.frontends.door import Door, Taken, open_taken
from vmap_ensemble.frontends.loading import ask_sample, load_served
from vmap_ensemble.frontends.ray_serve.metrics import Metrics
from vmap_ensemble.frontends.ray_serve.sagemaker import SageMakerDoor
from vmap_ensemble.frontends.ray_serve.settings import ModelSettings
from vmap_ensemble.process.threads import cores_at_hand
from vmap_ensemble.serving.batch import Incoming, Reply, answer_batch

Result = TypeVar("Result")


class Served:
    """One archive in one process.

    Args:
        name: What clients ask for.
        model: How it is served, unless a deployment's user_config says otherwise.
        most_bytes: Of a request's body.
        invocations: Whether SageMaker's addresses are answered, too.
    """

    def __init__(self, name: str, model: ModelSettings, most_bytes: int, invocations: bool = False) -> None:
        self._name, self._defaults = name, model
        self._model: ModelSettings | None = None
        # One thread for all that torch does: it has the threads that were set and measured with, and the loop stays
        # free to read what comes in meanwhile.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ensemble")
        self._idle = asyncio.Event()
        self._idle.set()
        self._door = Door({name: self.answer}, most_bytes)
        if invocations:
            self._door = SageMakerDoor(name, self.answer, most_bytes, self.check_health)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take a deployment's user_config; Ray calls it at the start, too. Requests wait while an archive is loaded.

        Raises:
            EnsembleError: It can't be served like that. What was served before is left as it was, but Ray ends the
                replica.
        """
        before, model = self._model, self._defaults.changed(user_config)
        if before is None or (before.archive, before.settings) != (model.archive, model.settings):
            self._model = None  # nobody is asked for its health meanwhile
            try:
                self.ensemble, self.metrics = await self._run(self._load, model)
            except BaseException:
                self._model = before
                raise
        batching: Any = self.answer_batch  # which serve.batch gave its setters
        batching.set_max_batch_size(model.batch_size)
        batching.set_batch_wait_timeout_s(model.batch_wait_s)
        self._model = model

    async def __call__(self, request: Request) -> Response:
        """A request over HTTP."""
        return await self._door(request)

    async def answer(self, taken: Taken) -> Reply:
        """A request that came through a door, this replica's own or the entrance's."""
        incoming = open_taken(taken, self.metrics.record)
        if isinstance(incoming, Reply):
            return incoming
        # serve.batch closes a batch after its wait even while another is run, so that under load each would hold
        # what came within 2 ms. Whoever comes during a forward waits here, and joins the next batch.
        await self._idle.wait()
        return await self.answer_batch(incoming)

    @serve.batch
    async def answer_batch(self, batch: list[Incoming]) -> list[Reply]:
        """One forward for all."""
        self._idle.clear()
        try:
            return await self._run(answer_batch, self.ensemble, batch, self.metrics.record)
        finally:
            self._idle.set()

    async def check_health(self) -> None:
        """Ask the members about the sample input; Ray replaces a replica where this raises, or takes too long."""
        if self._model is not None:
            await self._run(ask_sample, self.ensemble)

    def _load(self, model: ModelSettings) -> tuple[Ensemble, Metrics]:
        ensemble = load_served(model.archive, model.batch_size, _cores(), model.settings)
        metrics = Metrics(self._name, ensemble.identity.version if ensemble.identity else "")
        for reason in ensemble.fallbacks():
            metrics.record("EnsembleFallbacks", 1, reason)
        return ensemble, metrics

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _cores() -> int:
    """Torch's threads: the CPUs that Ray has given to this replica, as far as there are so many."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, min(int(given), cores_at_hand()))
