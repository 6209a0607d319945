"""Turns a batch of requests into one reply each, each on its own: the data plane that all servers share.

    read -> parse -> ONE forward -> answer          one reply per request, in order

An error of one request never reaches another; a forward that fails as a whole is run once for each example.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError, OutOfMemory, RequestError, numbered, where
from vmap_ensemble.many import answer_each
from vmap_ensemble.serving.requests import Request, error_body, read_request, wrap_answers
from vmap_ensemble.serving.statuses import reason_of, status_of
from vmap_ensemble.tasks.answers import Answer, Options, dump_json

logger = logging.getLogger(__name__)

Asks = Literal["predict", "explain", "describe"]
Record = Callable[..., None]  # name of a metric, value, own dimensions


@dataclass(frozen=True)
class Incoming:
    """One request as a server took it.

    Attributes:
        fields: Name of a multipart field, or `body` -> bytes, text, or JSON that the server has parsed.
        headers: The request's headers and, under each field's name, that field's own headers.
        asks: A prediction, an explanation, or the description of what is served.
    """

    fields: Mapping[str, Any]
    headers: Mapping[str, Any]
    asks: Asks = "predict"


@dataclass(frozen=True)
class Reply:
    """What one client gets: an HTTP status and a JSON text."""

    status: int
    text: str


def refusal(status: int, message: str) -> Reply:
    """A reply that says why there is no answer."""
    return Reply(status, dump_json(error_body(status, message)))


def answer_batch(ensemble: Ensemble, batch: Sequence[Incoming], record: Record = lambda *row: None) -> list[Reply]:
    """Answer a batch of requests, each on its own.

    Args:
        ensemble: What is asked.
        batch: Predictions share one forward; explanations and descriptions may lie among them.
        record: Called with what happened, under the names of docs/monitoring.md.

    Returns:
        One reply per request, in the order of the requests.
    """
    return _Batch(ensemble, record).answer(batch)


class _Batch:
    """One batch on its way: what is already replied, and what remains to be asked."""

    def __init__(self, ensemble: Ensemble, record: Record) -> None:
        self.ensemble, self.task, self.record = ensemble, ensemble.task, record
        self.replies: list[Any] = []

    def answer(self, batch: Sequence[Incoming]) -> list[Reply]:
        start = time.perf_counter()
        self.replies = [None] * len(batch)
        requests: dict[int, Request] = {}
        for index, incoming in enumerate(batch):
            with self._guard(index):
                self.replies[index] = self._special_reply(incoming)
                if self.replies[index] is None:
                    requests[index] = self._read(incoming)
        requests, examples, options = self._parse(requests)
        parsed_at = time.perf_counter()
        answers = iter(self._predict(examples, options) if examples else [])
        predicted_at = time.perf_counter()
        for index, request in requests.items():
            own = list(islice(answers, len(request.items)))  # examples lie in the order of the requests
            with self._guard(index):
                self.replies[index] = self._reply(request, own)
        finished = [self._finish(reply) for reply in self.replies]
        self._record_times(len(examples), parsed_at - start, predicted_at - parsed_at, predicted_at)
        return finished

    def _special_reply(self, incoming: Incoming) -> str | None:
        """Descriptions and explanations share the batch with predictions: decided per request."""
        if incoming.asks == "describe":
            return self.ensemble.describe().to_json()
        if incoming.asks == "explain":
            # Serialised here, under the guard of this request: what can't be hurts no neighbour.
            return dump_json(self._explain(self._read(incoming)))
        return None

    def _explain(self, request: Request) -> Any:
        examples = []
        for number, item in enumerate(request.items):
            with _numbered(number, request):
                examples.append(self.task.parse(item))
        self.task.check_examples(examples)
        bodies = self.ensemble.explain_examples(examples, request.options)
        return wrap_answers(request, bodies, self.ensemble.settings.name)

    def _read(self, incoming: Incoming) -> Request:
        """Read a request and check its options; lists are batches where the task says so."""
        task = self.task
        request = read_request(incoming.fields, incoming.headers, task.item_keys, task.lists_are_batches)
        for number, option in enumerate(request.options):
            with _numbered(number, request):
                self.ensemble.check_subset(option.subset)
        task.check_size(request.items)
        return request

    def _parse(self, requests: dict[int, Request]) -> tuple[dict[int, Request], list[Any], list[Options]]:
        """Parse the items of all requests, in threads; a request of which one fails gets its reply here.

        Returns:
            The requests that are left, and their examples and options, one per item, in the same order.
        """
        items = [item for request in requests.values() for item in request.items]
        parsed = iter(self.task.parse_items(items))
        left: dict[int, Request] = {}
        examples: list[Any] = []
        options: list[Options] = []
        for index, request in requests.items():
            own = list(islice(parsed, len(request.items)))
            with self._guard(index):
                for number, outcome in enumerate(own):
                    if isinstance(outcome, Exception):
                        with _numbered(number, request):
                            raise outcome
                self.task.check_examples(own)
                left[index] = request
                examples += own
                options += request.options
        return left, examples, options

    def _predict(self, examples: list[Any], options: list[Options]) -> list[Answer | ItemError]:
        """One forward for the batch; should it fail, one for each example, so that neighbours are answered."""
        return answer_each(
            self.ensemble, examples, options, lambda: self.record("EnsembleFallbacks", 1, "one_by_one")
        )

    def _reply(self, request: Request, answers: list[Answer | ItemError]) -> str:
        for number, (answer, options) in enumerate(zip(answers, request.options, strict=True)):
            if isinstance(answer, ItemError):
                with _numbered(number, request):
                    raise answer
            self._record_answer(answer, options)
        bodies = [answer.body for answer in answers if isinstance(answer, Answer)]
        return dump_json(wrap_answers(request, bodies, self.ensemble.settings.name))

    def _record_answer(self, answer: Answer, options: Options) -> None:
        if answer.mutual_information is not None:
            self.record("EnsembleMutualInformation", answer.mutual_information)
        if answer.body.get("abstain") is True:
            self.record("EnsembleAbstentions", 1)
        for name in answer.left_out:
            self.record("EnsembleNonFiniteMembers", 1, name)
        for name in answer.dissenting:
            self.record("EnsembleDissentingMembers", 1, name)
        for name in options.subset or ():
            self.record("EnsembleMemberAnswers", 1, name)

    @contextmanager
    def _guard(self, index: int) -> Iterator[None]:
        """Turn whatever one request raises into that request's own reply."""
        try:
            yield
        except ItemError as error:
            self.replies[index] = error
        except torch.OutOfMemoryError:
            self.replies[index] = OutOfMemory("not enough memory for this input")
        except Exception as error:
            logger.error("request %d failed: %s", index, where(error))
            self.replies[index] = RequestError(500, "this request could not be answered")

    def _finish(self, reply: Any) -> Reply:
        if not isinstance(reply, ItemError):
            return Reply(200, str(reply))
        status = status_of(reply)
        self.record("EnsembleRefusedRequests", 1, str(status), reason_of(status))
        return refusal(status, str(reply))

    def _record_times(self, batch: int, parse_s: float, forward_s: float, predicted_at: float) -> None:
        self.record("EnsembleParseTime", parse_s)
        if batch:
            self.record("EnsembleForwardTime", forward_s)
            self.record("EnsembleBatchSize", batch)
        self.record("EnsembleRespondTime", time.perf_counter() - predicted_at)


@contextmanager
def _numbered(number: int, request: Request) -> Iterator[None]:
    """Within it an item's error names the item, where the request holds several."""
    try:
        yield
    except ItemError as error:
        raise numbered(error, number) if len(request.items) > 1 else error from None
