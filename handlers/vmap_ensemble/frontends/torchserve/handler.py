"""Turns a task into a TorchServe handler: rows become requests, replies become rows, all else is the ensemble's.

TorchServe makes a handler without arguments, tells it later where its archive lies (`initialize`), and then hands it
batches (`handle`). A handler file holds one class, a task and this front end:

    class MnistHandler(TorchServeHandler, MnistTask): ...
"""

from __future__ import annotations

import json
import logging
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vmap_ensemble.archive.settings import Settings, load_settings
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.execution.modes import Execution
from vmap_ensemble.frontends.torchserve.metrics import Metrics
from vmap_ensemble.frontends.torchserve.worker import keep_parts_of_one_name, quieten_worker
from vmap_ensemble.process import phases
from vmap_ensemble.process.age import seconds_since_process_start
from vmap_ensemble.process.device import configure_torch
from vmap_ensemble.process.memory import freed_memory_returned
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.process.threads import cores_at_hand, threads_per_worker
from vmap_ensemble.serving.batch import Incoming, Reply, answer_batch
from vmap_ensemble.starting import make_place
from vmap_ensemble.tasks.task import Place, Task

logger = logging.getLogger(__name__)


class TorchServeHandler(Task):
    """TorchServe's side of a handler; the task that it is mixed with says what is served.

    Attributes:
        ensemble: What is asked, once `initialize` has loaded it.
        metrics: Where it is recorded what happened in a batch.
        phases_s: Seconds of each phase of the start.
    """

    ensemble: Ensemble
    metrics: Metrics

    def __init__(self, settings: Settings | None = None, place: Place | None = None) -> None:
        # TorchServe gives nothing yet: `initialize` does what is left. The library gives both.
        if settings is not None and place is not None:
            super().__init__(settings, place)

    def initialize(self, context: Any) -> None:
        """Load the archive that TorchServe has unpacked, and prove that its forward is right.

        Raises:
            EnsembleError: The archive can't be served; the log has one line that says why.
        """
        self.context = context
        self.manifest = context.manifest  # read by TorchServe's own tools
        timed = Phases()
        timed.seconds[phases.IMPORT] = seconds_since_process_start()
        self.phases_s = timed.seconds
        try:
            with freed_memory_returned():
                self.ensemble = self._load(context, timed)
        except EnsembleError as error:
            logger.error("cannot serve %s: %s", context.model_name, error)
            raise
        self.initialized = True
        self.metrics.flush()
        quieten_worker()
        logger.info("ready: %s", json.dumps(self.ensemble.summary()))

    def _load(self, context: Any, timed: Phases) -> Ensemble:
        folder = Path(context.system_properties["model_dir"])
        config = context.model_yaml_config or {}
        with timed(phases.SETTINGS):
            settings = load_settings(folder, self.settings_class, config.get("handler"))
            threads = settings.threads or threads_per_worker(config, cores_at_hand())
            configure_torch(threads, settings.float32_matmul_precision)
            self.metrics = Metrics(context.metrics, context.model_name, _version(context))
            keep_parts_of_one_name()
        with timed(phases.READ):
            place = make_place(settings, folder, threads, context.system_properties.get("gpu_id"))
        with timed(phases.BUILD):
            super().__init__(settings, place)
        ensemble = Ensemble.start(self, timed, [int(config.get("batchSize") or 1)])
        for reason in ensemble.fallbacks():
            self.metrics.record("EnsembleFallbacks", 1, reason)
        return ensemble

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer a batch of requests, each on its own: an error of one never reaches another.

        Args:
            data: One row per request, as TorchServe hands them over.
            context: The context of the batch: headers in, statuses out.

        Returns:
            One JSON text per request, in the order of the requests.
        """
        self.context = context
        batch = [Incoming(row, headers, _asks(headers)) for row, headers in _with_headers(data, context)]
        start = time.perf_counter()
        replies = answer_batch(self.ensemble, batch, self.metrics.record)
        self.phases_s.setdefault(phases.FIRST_REQUEST, time.perf_counter() - start)
        for index, reply in enumerate(replies):
            context.set_response_content_type(index, "application/json")
            if not any(isinstance(value, str) for value in batch[index].headers.values()):
                # A request without HTTP headers came over gRPC. One for a stream (StreamPredictions) waits for more
                # answers unless it is told that this is the last; over HTTP the header would end the connection.
                context.set_response_header(index, "ts_stream_next", "false")
            if reply.status != HTTPStatus.OK:
                context.set_response_status(reply.status, _phrase(reply), index)
        self.metrics.flush()
        return [reply.text for reply in replies]

    @property
    def execution(self) -> Execution:
        """How the forward is run, and why."""
        return self.ensemble.execution

    def describe_handle(self) -> dict[str, Any]:
        """What is served; TorchServe's name for it."""
        return self.ensemble.describe().to_dict()


class VmapEnsembleHandler(TorchServeHandler, Task):
    """Serves N checkpoints of one architecture: the base of handlers of your own (docs/own_handler.md)."""


def _version(context: Any) -> str:
    """The archive's version, as it was built."""
    model = (context.manifest or {}).get("model") or {}
    return str(model.get("modelVersion") or "")


def _with_headers(data: list[dict[str, Any]], context: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(row, context.get_all_request_header(index)) for index, row in enumerate(data)]


def _asks(headers: dict[str, Any]) -> Any:
    """TorchServe tells descriptions and explanations by headers that it adds."""
    flags = {str(k).lower(): v for k, v in headers.items()}
    return next((asks for asks in ("describe", "explain") if flags.get(asks) == "True"), "predict")


def _phrase(reply: Reply) -> str:
    try:
        return HTTPStatus(reply.status).phrase
    except ValueError:
        return "Error"
