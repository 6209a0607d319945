"""Turns the request batches of a loaded ensemble into answers, each request on its own.

    parse -> collate -> ONE vmapped forward -> answer          one JSON reply per request, in order

A handler of your own overrides at most `build_model`, `parse` and `answers` (docs/own_handler.md).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.ensemble import LoadedEnsemble
from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.requests import Request, as_batch, error_body, read_request, wrap_answers
from vmap_ensemble.tasks.answers import Answer, Options, dump_json
from vmap_ensemble.tasks.images.decoding import check_shape, read_item

logger = logging.getLogger(__name__)


class VmapEnsembleHandler(LoadedEnsemble):
    """Serves N checkpoints of one architecture as one model, with one vmapped forward per request batch.

    Attributes:
        lists_are_batches: Whether a JSON list is a batch of items; otherwise it is one item, a tensor.
    """

    lists_are_batches: bool = False

    # --- what a handler of your own may override ---------------------------------------------------------

    def parse(self, item: Any) -> Any:
        """Turn one item of a request into one example: a tensor without batch axis.

        Raises:
            RequestError: This item can't be read; its neighbours in the batch are answered all the same.
        """
        tensor = read_item(item)
        if not isinstance(tensor, Tensor):
            raise RequestError(415, "expected nested lists of numbers as JSON")
        return check_shape(tensor, self.input_shape)

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[Any]
    ) -> list[Answer | RequestError]:
        """Turn the outputs of all members into one answer per example; here: of classifiers.

        Args:
            outputs: What the model returns; tensors (M, B, ...).
            weights: (M, B) weights of the members per example.
            options: What the client asked for, one per example.
            examples: What `parse` returned, one per example.
        """
        return self.class_answers(outputs, weights, options)

    def parse_items(self, items: Sequence[Any]) -> list[Any]:
        """`parse` each item of a batch; where one fails its error stands in place of the example."""
        return self.try_all(self.parse, items)

    def try_all(self, parse: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
        """What `parse` makes of each job, or the error it raises; in threads from `threads_from_bytes` on."""

        def attempt(job: Any) -> Any:
            try:
                return parse(job)
            except Exception as error:
                return error

        least = self.threads_from_bytes
        if least is None or sum(map(_count_bytes, jobs)) < least:
            return [attempt(job) for job in jobs]
        return self.parsers.map(attempt, jobs)

    def explain_request(self, request: Request) -> Any:
        """Answer an explanations request."""
        raise RequestError(501, "this handler gives no explanations")

    # --- answering ---------------------------------------------------------------------------------------

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer a batch of requests, each on its own: an error of one never reaches another.

        Args:
            data: One row per request, as TorchServe hands them over.
            context: The context of the batch: headers in, statuses out.

        Returns:
            One JSON text per request, in the order of the requests.
        """
        self.context = context
        start = time.perf_counter()
        replies: list[Any] = [None] * len(data)
        requests: dict[int, Request] = {}
        for index, row in enumerate(data):
            with self._guard(replies, index):
                headers = context.get_all_request_header(index)
                replies[index] = self._special_reply(row, headers)
                if replies[index] is None:
                    requests[index] = self._check_request(read_request(row, headers))
        requests, examples, options = self._parse_requests(requests, replies)
        parsed_at = time.perf_counter()
        answers = iter(self._predict(examples, options) if examples else [])
        predicted_at = time.perf_counter()
        for index, request in requests.items():
            own = list(islice(answers, len(request.items)))  # examples lie in the order of the requests
            with self._guard(replies, index):
                replies[index] = self._reply(request, own)
        texts = [self._finish(reply, index) for index, reply in enumerate(replies)]
        self._record(len(examples), parsed_at - start, predicted_at - parsed_at, predicted_at)
        self.metrics.flush()
        return texts

    def _special_reply(self, row: dict[str, Any], headers: dict[str, Any]) -> Any:
        """Describe and explain requests share the batch with predictions: decided per request."""
        flags = {str(k).lower(): v for k, v in headers.items()}
        if flags.get("describe") == "True":
            return dump_json(self.describe_handle())
        if flags.get("explain") == "True":
            # Serialised here, under the guard of this request: what can't be hurts no neighbour.
            return dump_json(self.explain_request(read_request(row, headers)))
        return None

    def read_examples(self, request: Request) -> tuple[Request, list[Any]]:
        """Check one request's options, and parse its items; lists are batches where the handler says so.

        Raises:
            RequestError: An item can't be read, or the subset names a member that isn't there.
        """
        request = self._check_request(request)
        return request, [self.parse(item) for item in request.items]

    def _check_request(self, request: Request) -> Request:
        if self.lists_are_batches:
            request = as_batch(request)
        unknown = sorted(set(request.options.subset or ()) - set(self.forward.members.names))
        if unknown:
            known = ", ".join(self.forward.members.names)
            raise RequestError(422, f"subset: unknown member '{unknown[0][:80]}'; known: {known}")
        if request.options.subset is not None and not self.weights_of([request.options]).any():
            raise RequestError(422, "subset: the settings give its members no weight")
        return request

    def _parse_requests(
        self, requests: dict[int, Request], replies: list[Any]
    ) -> tuple[dict[int, Request], list[Any], list[Options]]:
        """Parse the items of all requests, in threads; a request of which one fails gets its reply here.

        Returns:
            The requests that are left, and their examples and options, one per item, in the same order.
        """
        items = [item for request in requests.values() for item in request.items]
        parsed = iter(self.parse_items(items))
        left: dict[int, Request] = {}
        examples: list[Any] = []
        options: list[Options] = []
        for index, request in requests.items():
            own = list(islice(parsed, len(request.items)))
            with self._guard(replies, index):
                for outcome in own:
                    if isinstance(outcome, Exception):
                        raise outcome
                left[index] = request
                examples += own
                options += [request.options] * len(own)
        return left, examples, options

    def weights_of(self, options: Sequence[Options]) -> Tensor:
        """(M, B) weights: the settings', 0 for members outside an example's subset."""
        weights = self.member_weights.expand(-1, len(options))
        if all(option.subset is None for option in options):
            return weights
        names = self.forward.members.names
        rows = [[option.subset is None or name in option.subset for option in options] for name in names]
        return weights * torch.tensor(rows, device=weights.device)

    def _predict(self, examples: list[Any], options: list[Options]) -> list[Answer | RequestError]:
        """One forward for the batch; should it fail, one for each example, so that neighbours are answered."""
        try:
            return self._forward_and_answer(examples, options)
        except RequestError as error:
            failure = error
        except torch.OutOfMemoryError:
            failure = RequestError(507, "not enough memory for this input")
        except Exception as error:
            logger.error("the forward of a batch of %d failed: %s", len(examples), _where(error))
            failure = RequestError(500, "the model failed on this input")
        if len(examples) == 1:
            return [failure]
        self.metrics.record("EnsembleFallbacks", 1, "one_by_one")
        logger.warning("a batch of %d failed as a whole; answering its examples one by one", len(examples))
        return [self._predict([e], [o])[0] for e, o in zip(examples, options, strict=True)]

    @torch.inference_mode()
    def _forward_and_answer(self, examples: list[Any], options: list[Options]) -> list[Answer | RequestError]:
        outputs = self.run(*self.collate(examples))
        answers = self.answers(outputs, self.weights_of(options), options, examples)
        if len(answers) != len(examples):
            raise ValueError(f"answers: expected one for each of {len(examples)} examples, got {len(answers)}")
        return answers

    def _reply(self, request: Request, answers: list[Answer | RequestError]) -> str:
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
            if answer.mutual_information is not None:
                self.metrics.record("EnsembleMutualInformation", answer.mutual_information)
            for name in answer.left_out:
                self.metrics.record("EnsembleNonFiniteMembers", 1, name)
        bodies = [answer.body for answer in answers if isinstance(answer, Answer)]
        return dump_json(wrap_answers(request, bodies, self.settings.name))

    @contextmanager
    def _guard(self, replies: list[Any], index: int) -> Iterator[None]:
        """Turn whatever one request raises into that request's own reply."""
        try:
            yield
        except RequestError as error:
            replies[index] = error
        except torch.OutOfMemoryError:
            replies[index] = RequestError(507, "not enough memory for this input")
        except Exception as error:
            logger.error("request %d failed: %s", index, _where(error))
            replies[index] = RequestError(500, "this request could not be answered")

    def _finish(self, reply: Any, index: int) -> str:
        """Set status and content type of a request, and give its text."""
        self.context.set_response_content_type(index, "application/json")
        if isinstance(reply, RequestError):
            self.context.set_response_status(reply.status, _phrase(reply.status), index)
            self.metrics.record("EnsembleRefusedRequests", 1, str(reply.status))
            return dump_json(error_body(reply))
        return str(reply)

    def _record(self, batch: int, parse_s: float, forward_s: float, predicted_at: float) -> None:
        self.metrics.record("EnsembleParseTime", parse_s)
        if batch:
            self.metrics.record("EnsembleForwardTime", forward_s)
            self.metrics.record("EnsembleBatchSize", batch)
        respond_s = time.perf_counter() - predicted_at
        self.metrics.record("EnsembleRespondTime", respond_s)
        self.phases_s.setdefault("first_request", parse_s + forward_s + respond_s)


def _count_bytes(job: Any) -> int:
    """Bytes of the files and texts in an item, or in what belongs to it; numbers of a list count nothing."""
    if isinstance(job, (bytes, bytearray, str)):
        return len(job)
    if isinstance(job, Mapping):
        job = tuple(job.values())
    return sum(map(_count_bytes, job)) if isinstance(job, tuple) else 0


def _where(error: Exception) -> str:
    """Type and innermost frames of an error, without its text, which may quote the request."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} in " + " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
