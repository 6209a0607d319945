"""Turns an archive of N members into one TorchServe model: load, prove, and answer request batches.

    parse -> collate -> ONE vmapped forward -> answer          one JSON reply per request, in order

A handler of your own overrides at most `build_model`, `parse` and `answers` (docs/own_handler.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from ts.torch_handler.base_handler import BaseHandler

from vmap_ensemble import __version__
from vmap_ensemble.ahead_of_time import COMPILED_FILE, CompiledForward
from vmap_ensemble.architecture import build_architecture
from vmap_ensemble.checkpoints import check_architecture
from vmap_ensemble.chunking import ChunkedRun
from vmap_ensemble.classification import Answer, ClassAnswers, read_labels
from vmap_ensemble.errors import EnsembleError, RequestError, SettingsError
from vmap_ensemble.execution import Execution, ExecutionOptions, build_execution, prove
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.images import check_shape, read_item
from vmap_ensemble.member_threads import MemberThreads
from vmap_ensemble.members import StackedMembers, load_members, read_manifest
from vmap_ensemble.metrics import Metrics
from vmap_ensemble.precision import Precision, read_precision
from vmap_ensemble.proof import Proof
from vmap_ensemble.requests import Options, Request, as_batch, dump_json, error_body, read_request, wrap_answers
from vmap_ensemble.runtime import DTYPES, configure_torch, quieten_worker, seconds_since_process_start
from vmap_ensemble.settings import Settings, load_settings

logger = logging.getLogger(__name__)

SAMPLE_BATCH = 2
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmap-ensemble"


class VmapEnsembleHandler(BaseHandler):
    """Serves N checkpoints of one architecture as one model, with one vmapped forward per request batch.

    Attributes:
        settings_class: The settings that this handler knows; override for options of your own.
        default_architecture: What is built where the settings name no architecture.
        default_input_shape: Shape of one example where the settings give none.
        lists_are_batches: Whether a JSON list is a batch of items; otherwise it is one item, a tensor.
        parses_in_threads: Whether `parse` is called for several items at a time, one per core: where an item
            costs milliseconds outside of Python.
        settings: The archive's settings.
        forward: The vmapped forward of the members.
        execution: How the forward is run, and why.
        precision: What precision.json says of the archive, if there is one.
        proof: What the comparison with the members' own forwards showed at load.
        phases_s: Seconds spent in each phase of loading.
    """

    settings_class: type[Settings] = Settings
    default_architecture: str = ""
    default_input_shape: tuple[int, ...] | None = None
    lists_are_batches: bool = False
    parses_in_threads: bool = False
    settings: Any
    forward: EnsembleForward
    proof: Proof
    execution: Execution
    precision: Precision | None

    # --- what a handler of your own may override ---------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The architecture in eval mode; its weights don't matter, the members' are used."""
        return build_architecture(self.architecture, self.settings.num_classes, self.folder)

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

    def collate(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Turn examples into the model's arguments on the device; here: one stacked tensor (B, ...)."""
        batch = torch.stack(list(examples))
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # else the copy waits for the whole batch
        return (batch.to(self.device, self.dtype if batch.is_floating_point() else None, non_blocking=True),)

    def sample_examples(self, count: int) -> list[Any]:
        """Examples to prove the forward on at load: seeded noise in the input's shape."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(self.input_shape, generator=generator) for _ in range(count)]

    def default_labels(self) -> dict[int, str] | None:
        """Labels where the archive brings no index_to_name.json."""
        return None

    def explain_request(self, request: Request) -> Any:
        """Answer an explanations request."""
        raise RequestError(501, "this handler gives no explanations")

    @property
    def architecture(self) -> str:
        """The architecture that is built: the settings', or this handler's default."""
        return self.settings.architecture or self.default_architecture

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        shape = self.settings.input_shape or self.default_input_shape
        if shape is None:
            raise SettingsError("setup_config.json: input_shape: expected the shape of one example, got nothing")
        return shape

    # --- loading -----------------------------------------------------------------------------------------

    def initialize(self, context: Any) -> None:
        """Load the archive that TorchServe has unpacked, and prove that its forward is right.

        Raises:
            EnsembleError: The archive can't be served; the log has one line that says why.
        """
        self.context = context
        self.manifest = context.manifest
        self.phases_s: dict[str, float] = {"import": seconds_since_process_start()}
        try:
            self._load(context)
        except EnsembleError as error:
            logger.error("cannot serve %s: %s", context.model_name, error)
            raise
        self.initialized = True
        quieten_worker()
        logger.info("ready: %s", json.dumps(self._summary()))

    def _load(self, context: Any) -> None:
        self.folder = Path(context.system_properties["model_dir"])
        config = context.model_yaml_config or {}
        with self._phase("settings"):
            self.settings = load_settings(self.folder, self.settings_class, config.get("handler"))
            gpu_id = context.system_properties.get("gpu_id")
            runtime = configure_torch(self.settings, gpu_id, config)
            self.device, self.dtype, self.threads = runtime.device, runtime.dtype, runtime.threads
            self.metrics = Metrics(context.metrics, context.model_name)
        with self._phase("read"):
            self.archive = read_manifest(self.folder)
            self.precision = read_precision(self.folder)
        self.forward = self.load_forward()
        self.member_weights = self.read_weights(self.forward.members)
        self.class_answers = ClassAnswers(
            self.settings, self.forward.members.names, read_labels(self.folder) or self.default_labels()
        )
        with self._phase("execution"):
            self.choose_execution(config)
        self._take_proof()
        self.parsers = MemberThreads(self.threads if self.parses_in_threads else 1)

    def open(self, folder: Path, settings: Settings) -> None:
        """Make ready for `load_forward` and `collate` outside of a server, on the CPU.

        Args:
            folder: An unpacked archive.
            settings: What to take for its settings; its own may ask for another precision.
        """
        self.folder, self.settings, self.phases_s = folder, settings, {}
        self.device, self.dtype = torch.device("cpu"), DTYPES[settings.dtype]
        self.precision = read_precision(folder)

    def load_forward(self) -> EnsembleForward:
        """Build the architecture, stack the members, and join both."""
        with self._phase("build"):
            model = self.build_model()
        # The files are mapped: their bytes are read while they are stacked.
        with self._phase("stack"):
            members = load_members(self.folder, self.device, self.dtype)
        with self._phase("prepare"):
            check_architecture("the members", members.spec(), model)
            return self.join(model, members)

    def join(self, model: nn.Module, members: StackedMembers) -> EnsembleForward:
        """The vmapped forward of the members in this architecture."""
        return EnsembleForward(model, members)

    def choose_execution(self, config: dict[str, Any]) -> None:
        """Decide how the forward is run; batches of one and of the configured size are what is measured."""
        sizes = sorted({1, int(config.get("batchSize") or 1)})
        hashes = "".join(member.sha256 for member in self.forward.members.members)
        compiled_file = self.folder / COMPILED_FILE
        compiled = compiled_file.read_bytes() if compiled_file.is_file() else b""
        chosen_for = f"{__version__} {self.settings.dtype} {hashes}".encode() + compiled
        options = ExecutionOptions(
            budget_s=self.settings.execution_budget_s,
            tolerance=self.settings.tolerance,
            cache_dir=CACHE / "execution",
            archive_sha=hashlib.sha256(chosen_for).hexdigest(),
            sample=self.collate(self.sample_examples(SAMPLE_BATCH)),
            packed=self.load_compiled if compiled else None,
        )
        examples = [self.collate(self.sample_examples(size)) for size in sizes]
        self.execution = build_execution(self.settings.execution, self.forward, examples, options)
        for candidate in self.execution.candidates:
            if candidate.refused:
                self.metrics.record("EnsembleFallbacks", 1, f"{candidate.name} refused")
        self.run = self.chunked(self.execution)

    def load_compiled(self) -> CompiledForward:
        """The forward as native code, where `./archive.sh --compile` has packed it."""
        return CompiledForward(self.folder, self.forward.members, self.input_shape)

    def chunked(self, run: Callable[..., Any]) -> ChunkedRun:
        """A forward that runs in chunks once memory runs out."""
        return ChunkedRun(run, len(self.forward.members.names), self.forward.part)

    def _take_proof(self) -> None:
        """The proof that choosing the execution has made; made here where a subclass chose without one."""
        if self.execution.proof is None:
            sample = self.collate(self.sample_examples(SAMPLE_BATCH))
            prove(self.execution, self.forward, sample, self.settings.tolerance)
        else:
            self.phases_s["execution"] -= self.execution.proof_s
        self.phases_s["equivalence"] = self.execution.proof_s
        self.proof = cast(Proof, self.execution.proof)
        for name in self.proof.not_finite:
            logger.warning("member '%s' gives NaN or infinity on the sample input", name)

    def read_weights(self, members: StackedMembers) -> Tensor:
        """(M, 1) weights of the members, as the settings give them.

        Raises:
            SettingsError: They are for other members, or all 0.
        """
        given = self.settings.weights
        if given is None:
            return torch.ones(len(members.names), 1, device=self.device)
        unknown = sorted(set(given) - set(members.names))
        missing = sorted(set(members.names) - set(given))
        if unknown or missing or not any(given.values()):
            raise SettingsError(
                f"setup_config.json: weights: expected one for each of {', '.join(members.names)} and one above "
                f"0, got unknown {unknown}, missing {missing}"
            )
        return torch.tensor([[given[name]] for name in members.names], device=self.device)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases_s[name] = time.perf_counter() - start

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
        """Check a request's options, and parse its items; lists are batches where the handler says so.

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
        parsed = iter(self.parsers.map(self._try_to_parse, items))
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

    def _try_to_parse(self, item: Any) -> Any:
        """The example of an item, or the error that its request is answered with."""
        try:
            return self.parse(item)
        except Exception as error:
            return error

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

    # --- describing --------------------------------------------------------------------------------------

    def describe_handle(self) -> dict[str, Any]:
        """What is served: members with SHA-256, dtype, device, how the forward is run, labels."""
        labels = self.class_answers.labels
        return {
            **self._summary(),
            "members": [asdict(member) for member in self.archive.members],
            "settings": {k: v for k, v in asdict(self.settings).items() if v is not None},
            "labels": [labels[index] for index in sorted(labels)],
        }

    def _summary(self) -> dict[str, Any]:
        return {
            "ensemble": self.settings.name,
            "version": __version__,
            "architecture": self.architecture,
            "size": len(self.forward.members.names),
            "dtype": self.settings.dtype,
            "precision": self.precision.summary() if self.precision else None,
            "device": str(self.device),
            "threads": self.threads,
            "execution": {
                "asked": self.settings.execution,
                "serves": self.execution.name,
                "reason": self.execution.reason,
                "candidates": [asdict(candidate) for candidate in self.execution.candidates],
            },
            "equivalence": asdict(self.proof),
            "load_s": {name: round(seconds, 3) for name, seconds in self.phases_s.items()},
        }


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
