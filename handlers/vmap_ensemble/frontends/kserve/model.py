"""Turns an archive into a model of KServe's SDK: requests that wait for each other share one forward."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException
from kserve import InferRequest, InferResponse, Model

from vmap_ensemble.errors import RequestError, where
from vmap_ensemble.frontends.door import Taken, open_taken
from vmap_ensemble.frontends.gathering import Gathering
from vmap_ensemble.frontends.kserve.metrics import Metrics
from vmap_ensemble.frontends.kserve.tensors import read_tensors, to_response
from vmap_ensemble.frontends.loading import ask_sample, load_served
from vmap_ensemble.process.threads import cores_at_hand
from vmap_ensemble.serving.batch import Asks, Incoming, Reply, answer_batch, refusal

logger = logging.getLogger(__name__)

# Of gRPC, by the status that HTTP would have; others are INVALID_ARGUMENT.
CODES = {
    413: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    507: StatusCode.RESOURCE_EXHAUSTED,
}


class Refused(GrpcException):
    """A reply that is no answer; over gRPC its JSON is the call's details.

    Args:
        reply: What the client gets.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text, CODES.get(reply.status, StatusCode.INVALID_ARGUMENT))
        self.reply = reply


class EnsembleModel(Model):
    """One archive.

    Args:
        name: What clients ask for.
        archive: A .mar, or the folder that one was unpacked into.
        batch_size: Requests that share one forward, at most.
        settings: Instead of the archive's own, as in setup_config.json; `threads` and `device` among them.
    """

    def __init__(self, name: str, archive: Path, batch_size: int, settings: Mapping[str, Any]) -> None:
        super().__init__(name)
        self._archive, self._batch_size, self._settings = archive, batch_size, settings

    def load(self) -> bool:
        """Load and prove the archive; the SDK calls it again for a model that isn't ready.

        Raises:
            EnsembleError: It can't be loaded; one line that says why.
        """
        self.ensemble = load_served(str(self._archive), self._batch_size, cores_at_hand(), self._settings)
        self.metrics = Metrics(self.name, self.ensemble.identity.version if self.ensemble.identity else "")
        for reason in self.ensemble.fallbacks():
            self.metrics.record("EnsembleFallbacks", 1, reason)
        self._gathering = Gathering(self._answer_batch, self._batch_size)
        self.ready = True
        return self.ready

    def _answer_batch(self, batch: list[Incoming]) -> list[Reply]:
        return answer_batch(self.ensemble, batch, self.metrics.record)

    async def predicts(self) -> bool:
        """Whether all members answer the sample input now: what a probe wants to know."""
        try:
            await self._gathering.run(ask_sample, self.ensemble)
        except Exception as error:
            logger.error("%s doesn't answer its sample input: %s", self.name, where(error))
            return False
        return True

    async def answer(self, taken: Taken) -> Reply:
        """A request that came through our own door, whose body the SDK hasn't touched."""
        if not self.ready:
            raise RequestError(503, "the model isn't served any more")
        incoming = open_taken(taken, self.metrics.record)
        return incoming if isinstance(incoming, Reply) else await self._gathering.ask(incoming)

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        """A prediction that the SDK has read: over gRPC, with binary tensors, or in a CloudEvent.

        Raises:
            Refused: There is no answer.
        """
        return await self._ask(payload, headers, "predict")

    async def explain(self, payload: Any, headers: dict[str, str] | None = None) -> Any:
        """As `predict`, for an explanation."""
        return await self._ask(payload, headers, "explain")

    async def _ask(self, payload: Any, headers: dict[str, str] | None, asks: Asks) -> InferResponse | dict[str, Any]:
        of_tensors = isinstance(payload, InferRequest)
        try:
            body = read_tensors(payload) if of_tensors else payload
        except RequestError as error:
            raise Refused(refusal(error.status, error.message)) from None
        reply = await self._gathering.ask(Incoming({"body": body}, headers or {}, asks))
        if reply.status != 200:
            raise Refused(reply)
        return to_response(reply) if of_tensors else json.loads(reply.text)
