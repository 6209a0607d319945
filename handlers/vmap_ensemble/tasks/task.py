"""Turns items into a model's arguments, and the outputs of all members into one answer each: what a task is.

    item -> parse -> example    examples -> collate -> arguments (B, ...)    outputs (M, B, ...) -> answers

A task knows neither a server nor how the forward is run. One of your own overrides at most `build_model`, `parse`
and `answers` (docs/own_handler.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.archive.manifest import Manifest, load_members
from vmap_ensemble.archive.precision import Precision, read_precision
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.aggregate import combine_classes
from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.core.states import check_architecture
from vmap_ensemble.errors import ItemError, LoadError, NotOffered, SettingsError, UnknownKind
from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.modes import Execution
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.process import phases
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.tasks.answers import Answer, Options, dump_json
from vmap_ensemble.tasks.classification import ClassAnswers, kind_for, pick_outputs
from vmap_ensemble.tasks.images.decoding import ITEM_KEYS, check_shape, read_item


@dataclass(frozen=True)
class Place:
    """What a task may read, and where it computes.

    Attributes:
        folder: The unpacked archive; None for members in memory.
        manifest: The members, in the order of the stack.
        device: Where the model's arguments go.
        dtype: Floating point type of the members and of the arguments.
        threads: Cores that items may be read with.
    """

    folder: Path | None = None
    manifest: Manifest = field(default_factory=lambda: Manifest(()))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(member.name for member in self.manifest.members)


class Asked(Protocol):
    """What an explanation may ask of the ensemble that it is about."""

    forward: Any
    run: Callable[..., Any]

    def weights_of(self, options: Sequence[Options]) -> Tensor:
        """(M, B) weights of the members for these options."""


class Task:
    """Classification of tensors, and what other tasks inherit.

    Args:
        settings: The archive's settings.
        place: What it may read, and where it computes.

    Attributes:
        settings_class: The settings that this task knows; override for options of your own.
        default_architecture: What is built where the settings name no architecture.
        default_input_shape: Shape of one example where the settings give none.
        threads_from_bytes: Size of a batch's files and texts from which `parse` is called for several items at a
            time, one per core: worth it where items cost most of their time outside of Python. None: never.
        lists_are_batches: Whether a JSON list is a batch of items; otherwise it is one item, a tensor.
        reads_texts: Whether a text is an item; otherwise a file's bytes are.
        calibrates: Whether `quantise` needs the ranges of activations, which samples give at the archive's build.
    """

    settings_class: type[Settings] = Settings
    default_architecture: str = ""
    default_input_shape: tuple[int, ...] | None = None
    threads_from_bytes: int | None = None
    lists_are_batches: bool = False
    reads_texts: bool = False
    calibrates: bool = True
    settings: Any

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place = settings, place

    # --- what a task of your own may override --------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The architecture in eval mode; its weights don't matter, the members' are used."""
        return build_architecture(self.architecture, self.settings.num_classes, self.place.folder)

    def parse(self, item: Any) -> Any:
        """Turn one item into one example: a tensor without batch axis.

        Raises:
            ItemError: This item can't be read; its neighbours in the batch are answered all the same.
        """
        tensor = item if isinstance(item, Tensor) else read_item(item)
        if not isinstance(tensor, Tensor):
            raise UnknownKind("expected nested lists of numbers as JSON")
        known = self.settings.input_shape or self.default_input_shape
        return check_shape(tensor, known) if known else tensor

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[Any]
    ) -> list[Answer | ItemError]:
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
        if self.place.device.type == "cuda":
            batch = batch.pin_memory()  # else the copy waits for the whole batch
        return (
            batch.to(self.place.device, self.place.dtype if batch.is_floating_point() else None, non_blocking=True),
        )

    def size_of(self, example: Any) -> int:
        """What an example costs beside others: a batch of like sizes needs least padding."""
        return 0

    def sample_examples(self, count: int) -> list[Any]:
        """Examples to prove the forward on at load: seeded noise in the input's shape."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(self.input_shape, generator=generator) for _ in range(count)]

    def default_labels(self) -> dict[int, str] | None:
        """Labels where the archive brings no index_to_name.json."""
        return None

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """The ensemble's probability of each class.

        Args:
            outputs: What all members give; (M, B, C) logits, alone or under the name `logits`.
            weights: (M, 1) or (M, B) of the members.

        Returns:
            (B, C).

        Raises:
            NotOffered: This task isn't a classification.
        """
        settings = self.settings
        picked = pick_outputs(outputs, settings.num_classes)
        weights = weights.expand(-1, picked.shape[1])
        kind = self.class_answers.kind
        return combine_classes(picked, weights, settings.aggregation, settings.temperature, kind).probabilities

    def explain(self, asked: Asked, examples: Sequence[Any], options: Sequence[Options]) -> list[dict[str, Any]]:
        """What each part of an example adds to the answer to it, one body per example.

        Raises:
            ItemError: This task gives no explanations, or none of what is asked.
        """
        raise NotOffered("this handler gives no explanations")

    # --- what a task says of itself --------------------------------------------------------------------------

    @classmethod
    def architecture_of(cls, settings: Any) -> str:
        """The architecture that settings ask for, or this task's default."""
        return str(settings.architecture or cls.default_architecture)

    @property
    def architecture(self) -> str:
        """The architecture that is built."""
        return self.architecture_of(self.settings)

    @property
    def combines_classes(self) -> bool:
        """Whether an answer is one of C classes, as `combine_classes` finds it; no where `answers` is one's own."""
        return type(self).answers is Task.answers

    @property
    def item_keys(self) -> tuple[str, ...] | None:
        """Keys that an item which is an object may have; None: any, as where `parse` is one's own."""
        return ITEM_KEYS if type(self).parse is Task.parse else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        shape = self.settings.input_shape or self.default_input_shape
        if shape is None:
            raise SettingsError(
                "setup_config.json: input_shape: expected the shape of one example, got nothing: give --input-shape"
            )
        return shape

    @cached_property
    def labels(self) -> dict[int, str]:
        """Class number -> label: the archive's, or this task's own."""
        folder = self.place.folder
        return (read_labels(folder) if folder else None) or self.default_labels() or {}

    @cached_property
    def class_answers(self) -> ClassAnswers:
        """Answers of a classifier, by the settings."""
        return ClassAnswers(self.settings, self.place.names, self.labels)

    def check_size(self, items: Sequence[Any]) -> None:
        """Refuse a request whose items are too much together, before any is read.

        Raises:
            TooLargeItem: Says what there is and how much may be.
        """

    def check_examples(self, examples: Sequence[Any]) -> None:
        """Refuse a request whose examples cost too much together.

        Raises:
            TooLargeItem: Says what there is and how much may be.
        """

    def see_outputs(self, outputs: Any) -> None:
        """Told once, what the members give for a sample: whether it is logits or probabilities, where that matters.

        Raises:
            LoadError: It can't be answered from.
        """
        if type(self).answers is Task.answers:
            self.class_answers.kind = kind_for(self.settings, outputs)

    def sample_request(self) -> bytes:
        """The body of a request to try an archive with; here the noise that its forward is proved on."""
        (example,) = self.sample_examples(1)
        return dump_json(example.tolist()).encode()

    # --- the forward -----------------------------------------------------------------------------------------

    def make_forward(self, timed: Phases) -> Forward:
        """Build the architecture, stack the archive's members, and join both; with quantization, in 8 bits.

        Raises:
            LoadError: What 8 bits need is missing in the archive, or can't be had for its members.
        """
        with timed(phases.BUILD):
            model = self.build_model()
        # The files are mapped: their bytes are read while they are stacked.
        with timed(phases.STACK):
            members = load_members(self._folder(), self.place.device, self.place.dtype)
        with timed(phases.PREPARE):
            check_architecture("the members", members.spec(), model)
            forward = self.join(model, members)
        if not getattr(self.settings, "quantization", None):
            return forward
        with timed(phases.QUANTISE):
            return self.quantise(forward, read_precision(self._folder()))

    def join(self, model: nn.Module, members: StackedMembers) -> EnsembleForward:
        """The vmapped forward of the members in this architecture."""
        return EnsembleForward(model, members)

    def quantise(self, forward: Forward, precision: Precision | None) -> Forward:
        """The members in 8 bits.

        Args:
            forward: Of the members in float32; it isn't used afterwards.
            precision: What was found when the archive was built; None if it wasn't judged.

        Raises:
            LoadError: They can't be had.
        """
        raise LoadError(f"quantization: {type(self).__name__} has no 8-bit form; leave it out")

    def only_execution(self, forward: Forward) -> Execution | None:
        """The one way to run the forward, where there is only one; None: the settings and measurements decide."""
        return None

    def lay_out(self, channels_last: bool) -> None:
        """Told once, which memory format the chosen forward takes without a copy."""

    def _folder(self) -> Path:
        if self.place.folder is None:
            raise SettingsError("members in memory bring no archive; this task reads one")
        return self.place.folder

    # --- reading many items ----------------------------------------------------------------------------------

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
        return self._parsers.map(attempt, jobs)

    @cached_property
    def _parsers(self) -> MemberThreads:
        return MemberThreads(self.place.threads)


def _count_bytes(job: Any) -> int:
    """Bytes of the files and texts in an item, or in what belongs to it; numbers of a list count nothing."""
    if isinstance(job, (bytes, bytearray, str)):
        return len(job)
    if isinstance(job, Mapping):
        job = tuple(job.values())
    return sum(map(_count_bytes, job)) if isinstance(job, tuple) else 0
