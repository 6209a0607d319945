"""Turns N checkpoints of one architecture into one object to be asked: members, the way to run them, and a task.

    Ensemble.load("resnet_ens.mar").predict([Path("cat.jpg")])      an archive, by the answers that a server gives
    Ensemble.of(model, {"a": state, "b": state}).outputs(x)         state dicts in memory -> (M, B, C)

No server is needed for it, and none is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vmap_ensemble.archive.identity import identify
from vmap_ensemble.archive.manifest import Manifest
from vmap_ensemble.archive.precision import Precision, read_precision
from vmap_ensemble.archive.settings import load_settings, override_settings, parse_settings, read_block
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.members import Member, stack_members
from vmap_ensemble.core.proof import Proof
from vmap_ensemble.core.states import fit_to_architecture
from vmap_ensemble.description import Description
from vmap_ensemble.errors import ItemError, UnfitItem, numbered
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.chunking import ChunkedRun
from vmap_ensemble.execution.modes import Execution, prove
from vmap_ensemble.execution.register import ExecutionOptions
from vmap_ensemble.many import Numbered, Windows, answer_window, find_batch, load_windows, open_item
from vmap_ensemble.process import phases
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.starting import (
    SAMPLE_BATCH,
    ProvedAtFirst,
    choose_execution,
    depends_on_neighbours,
    find_packed,
    make_place,
    read_weights,
)
from vmap_ensemble.tasks.answers import Answer, Options, sign
from vmap_ensemble.tasks.register import find_task
from vmap_ensemble.tasks.task import Place, Task
from vmap_ensemble.version import __version__

logger = logging.getLogger(__name__)


class Ensemble:
    """N members of one architecture, ready to be asked; whole when constructed. See `load` and `of`.

    Args:
        forward: The vmapped forward of the members.
        execution: How it is run, chosen and proved.
        task: Turns items into the forward's arguments and its outputs into answers.
        precision: What precision.json of the archive says, if there is one.
        timed: Seconds of each phase of the start.
        alone: Whether each example gets a forward of its own, since its answer would depend on its neighbours.

    Raises:
        SettingsError: The settings' weights are for other members, or all 0.

    Attributes:
        names: The members, in the order of axis 0 of all outputs.
        settings: The archive's settings.
        run: The forward as it is run: arguments (B, ...) -> outputs (M, B, ...); in chunks once memory runs out.
        proof: What the comparison with the members' own forwards showed.
        identity: Version and hash of the archive; None for members in memory.
    """

    def __init__(
        self,
        forward: Forward,
        execution: Execution,
        task: Task,
        precision: Precision | None = None,
        timed: Phases | None = None,
        alone: bool = False,
    ) -> None:
        self.alone = alone
        self._has_seen = False
        self.forward, self.execution, self.task, self.precision = forward, execution, task, precision
        self.settings: Any = task.settings
        self.names = forward.members.names
        self.timed = timed or Phases()
        self.run: Callable[..., Any] = ChunkedRun(execution, len(self.names), forward.part)
        self._packed = find_packed(task.place.folder)
        self.identity = identify(task.place.folder) if task.place.folder else None
        self._hashes = {member.name: member.sha256 for member in forward.members.members}
        self.member_weights = read_weights(self.settings, self.names).to(task.place.device)
        task.lay_out(execution.channels_last)

    # --- making one ------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        execution: str | None = None,
        threads: int | None = None,
        batch_sizes: Sequence[int] = (1, 8),
        task: type[Task] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Ensemble:
        """Load an archive that `./archive.sh` built.

        Args:
            path: A .mar, or the folder that one was unpacked into.
            device: `cpu`, `cuda:0`, …; the settings' by default, or the first GPU, or the CPU.
            dtype: `fp32`, `fp16` or `bf16` instead of the settings'.
            execution: How the forward is run, instead of the settings': `eager` starts at once, `auto` measures.
            threads: torch's threads in this process; by default they stay as they are.
            batch_sizes: Sizes that will be asked, for `auto` to measure.
            task: What becomes of items and outputs, instead of the archive's own handler's.
            settings: Others of the settings, instead of the archive's, as in setup_config.json.

        Raises:
            EnsembleError: The archive can't be loaded; one line that says why.

        Note:
            torch.set_float32_matmul_precision and cuDNN's TF32 switch are set for the process, as the settings say:
            members in float32 would be answered in TF32 otherwise.
        """
        timed = Phases()
        if threads is not None:
            torch.set_num_threads(threads)
        with unpacked(path) as folder:
            with timed(phases.SETTINGS):
                kind = task or find_task(folder, str(read_block(folder).get("handler", "")))
                given = {"device": device, "dtype": dtype, "execution": execution}
                given = {**(settings or {}), **{key: value for key, value in given.items() if value is not None}}
                own = override_settings(load_settings(folder, kind.settings_class), given)
            place = make_place(own, folder, threads or torch.get_num_threads(), 0)
            with timed(phases.BUILD):
                made = kind(own, place)
            return cls.start(made, timed, batch_sizes)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        states: Mapping[str, Mapping[str, Tensor]],
        *,
        example: Tensor | tuple[Any, ...] | None = None,
        settings: Mapping[str, Any] | None = None,
        task: type[Task] = Task,
        device: str | None = None,
        folder: Path | None = None,
    ) -> Ensemble:
        """Make one of state dicts in memory.

        Args:
            model: The architecture, of which a copy is taken; its own weights don't matter.
            states: Name of the member -> its state dict.
            example: A batch of the model's input, (B, ...), or a tuple of its arguments: what `auto` measures and
                the proof is made on. Without one the vmapped forward serves, proved on the first batch.
            settings: As in setup_config.json.
            task: What becomes of items and outputs; by default tensors are classified.
            device: Where the members go; the CPU by default.
            folder: What the task reads beside members: labels, pretrained/ with config and tokenizer.

        Raises:
            MemberError: A state dict doesn't fit the model or the others.
            SettingsError: A setting is unknown or wrong.
        """
        block = {
            "execution": "auto" if example is not None else "eager",
            **(settings or {}),
            "device": device or "cpu",
        }
        args = example if isinstance(example, tuple) else () if example is None else (example,)
        if len(args) == 1:
            block.setdefault("input_shape", list(args[0].shape[1:]))
        checked = parse_settings(block, task.settings_class, "settings")
        fitted = {name: fit_to_architecture(name, dict(state), model) for name, state in states.items()}
        manifest = Manifest(tuple(Member(name, "", "", "", 0) for name in states))
        place = make_place(checked, None, torch.get_num_threads(), None)
        place = dataclasses.replace(place, folder=folder, manifest=manifest)
        made = task(checked, place)
        members = dataclasses.replace(stack_members(fitted, place.device, place.dtype), members=manifest.members)
        forward: Forward = made.join(copy.deepcopy(model).eval(), members)
        if getattr(checked, "quantization", None):
            forward = made.quantise(forward, None if folder is None else read_precision(folder))
        args = tuple(_move(arg, place) for arg in args)
        if not args:
            run = ProvedAtFirst(forward)
            return cls(forward, Execution("eager", "no example was given to measure with", [], run), made)
        options = ExecutionOptions(tolerance=checked.tolerance, budget_s=checked.execution_budget_s)
        return cls(forward, build_execution(checked.execution, forward, [args], options), made)

    @classmethod
    def start(cls, task: Task, timed: Phases, batch_sizes: Sequence[int]) -> Ensemble:
        """Load the members of a task's archive, choose how they are run, and prove it.

        Args:
            task: Made for an unpacked archive.
            timed: Gets the seconds of each phase.
            batch_sizes: Sizes that will be asked.

        Raises:
            EnsembleError: The archive can't be loaded.
        """
        forward = task.make_forward(timed)
        with timed(phases.EXECUTION):
            execution = task.only_execution(forward) or choose_execution(task, forward, batch_sizes)
        if execution.proof is None:
            sample = task.collate(task.sample_examples(SAMPLE_BATCH))
            prove(execution, forward, sample, task.settings.tolerance)
        else:
            timed.seconds[phases.EXECUTION] -= execution.proof_s
        timed.seconds[phases.EQUIVALENCE] = execution.proof_s
        alone = depends_on_neighbours(task, forward)
        if alone is not None:
            execution.reason += f"; each example alone, since in a batch its answer differs by {alone:.1e}"
            logger.warning(
                "%s: rows of a batch depend on each other: examples are run one by one", task.settings.name
            )
        folder = task.place.folder
        precision = read_precision(folder) if folder else None
        ensemble = cls(forward, execution, task, precision, timed, alone is not None)
        with torch.inference_mode():
            ensemble._seen(ensemble.run(*task.collate(task.sample_examples(SAMPLE_BATCH))))
        for name in execution.proof.not_finite if execution.proof else ():
            logger.warning("member '%s' gives NaN or infinity on the sample input", name)
        return ensemble

    # --- asking it -------------------------------------------------------------------------------------------

    def predict(
        self,
        items: Sequence[Any],
        *,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
        detail: bool = False,
        errors: str = "raise",
    ) -> list[Any]:
        """Answer items as a server would, with one forward for all of them.

        Args:
            items: What the task reads: paths and bytes of files, Pillow images, tensors, texts, JSON-like objects.
            subset: Names of the members that are asked; all by default.
            top_k: Number of labels in an answer.
            detail: Whether each answer tells what each member says.
            errors: `raise` at the first item that can't be answered, or `return` its error in the answer's place.

        Returns:
            One Answer per item, in order: `.body` is the answer, `.to_json()` its text.

        Raises:
            ItemError: An item can't be answered; the message begins with its number.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f"errors: expected 'raise' or 'return', got {errors!r}")
        self.check_subset(subset)
        options = Options(detail=detail, subset=None if subset is None else tuple(subset), top_k=top_k)
        found = self.task.parse_items([open_item(item) for item in items])
        good = [index for index, outcome in enumerate(found) if not isinstance(outcome, Exception)]
        answers = self.answer([found[index] for index in good], [options] * len(good)) if good else []
        for index, answer in zip(good, answers, strict=True):
            found[index] = answer
        if errors == "raise":
            for index, outcome in enumerate(found):
                if isinstance(outcome, ItemError):
                    raise numbered(outcome, index)
                if isinstance(outcome, Exception):
                    raise outcome
        return found

    def predict_many(
        self,
        items: Iterable[Any],
        *,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
        detail: bool = False,
        batch_size: int | None = None,
        workers: int = 0,
    ) -> Iterator[Answer | ItemError]:
        """Answer any number of items, one after another, in constant memory.

        Args:
            items: As of `predict`; read as far as the answers are taken.
            subset: Names of the members that are asked; all by default.
            top_k: Number of labels in an answer.
            detail: Whether each answer tells what each member says.
            batch_size: Examples in a forward; measured on the first items by default.
            workers: Processes that read, decode and tokenise ahead; items must then be a sequence, or something
                else that can be iterated over anew.

        Yields:
            One Answer per item, in order; in place of one that can't be had the ItemError that says why.
        """
        self.check_subset(subset)
        options = Options(detail=detail, subset=None if subset is None else tuple(subset), top_k=top_k)
        if workers and iter(items) is items:
            raise ValueError("workers: expected items that each process can iterate over anew, such as a list")
        for _, examples in load_windows(Windows(self.task, Numbered(items)), workers):
            batch_size = batch_size or find_batch(self, examples, options)
            yield from answer_window(self, examples, options, batch_size)

    @torch.inference_mode()
    def answer(self, examples: Sequence[Any], options: Sequence[Options]) -> list[Answer | ItemError]:
        """One forward for examples that the task has parsed, and one answer each.

        Args:
            examples: What the task's `parse` gave, at least one.
            options: One per example.
        """
        if self.alone and len(examples) > 1:
            pairs = zip(examples, options, strict=True)
            return [answer for example, option in pairs for answer in self.answer([example], [option])]
        outputs = self._seen(self.run(*self.task.collate(examples)))
        answers = self.task.answers(outputs, self.weights_of(options), options, examples)
        if len(answers) != len(examples):
            raise ValueError(f"answers: expected one for each of {len(examples)} examples, got {len(answers)}")
        for answer, option in zip(answers, options, strict=True):
            if isinstance(answer, Answer):
                self._sign(answer.body, option)
        return answers

    def _sign(self, body: dict[str, Any], option: Options) -> None:
        if option.detail or self.settings.identify_answers:
            sign(body, self.identity, self._hashes if option.detail else {})

    @torch.inference_mode()
    def outputs(self, *batch: Any) -> Any:
        """What all members give for one batch.

        Args:
            batch: The model's arguments, tensors (B, ...) on any device; or one list of items that the task reads.

        Returns:
            The model's output structure; each tensor (M, B, ...), member-major, on the members' device.
        """
        rows = self._rows(batch) if self.alone else [self._arguments(batch)]
        if len(rows) == 1:
            return self.run(*rows[0])
        return pytree.tree_map(lambda *leaves: torch.cat(leaves, dim=1), *(self.run(*row) for row in rows))

    __call__ = outputs

    @torch.inference_mode()
    def probabilities(self, *batch: Any) -> Tensor:
        """The ensemble's probability of each class, by the settings' aggregation, weights and temperature.

        Args:
            batch: As of `outputs`.

        Returns:
            (B, C).

        Raises:
            NotOffered: The task isn't a classification.
        """
        outputs = self._seen(self.outputs(*batch))
        return self.task.probabilities(outputs, self.member_weights)

    def explain(self, items: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """What each part of an item adds to the answer to it.

        Args:
            items: As of `predict`.
            options: `target`, `subset`, `detail`, as a request has them.

        Raises:
            NotOffered: The task gives no explanations.
        """
        examples = []
        for number, item in enumerate(items):
            try:
                examples.append(self.task.parse(open_item(item)))
            except ItemError as error:
                raise numbered(error, number) from None
        return self.explain_examples(examples, [Options(**options)] * len(examples))

    def explain_examples(self, examples: Sequence[Any], options: Sequence[Options]) -> list[dict[str, Any]]:
        """As `explain`, of examples that the task has parsed, with options for each."""
        bodies = self.task.explain(self, examples, options)
        for body, option in zip(bodies, options, strict=True):
            self._sign(body, option)
        return bodies

    def _seen(self, outputs: Any) -> Any:
        """The outputs; the first that there are tell the task what they are."""
        if not self._has_seen:
            self.task.see_outputs(outputs)
            self._has_seen = True
        return outputs

    def weights_of(self, options: Sequence[Options]) -> Tensor:
        """(M, B) weights: the settings', 0 for members outside an example's subset."""
        weights = self.member_weights.expand(-1, len(options))
        if all(option.subset is None for option in options):
            return weights
        rows = [[option.subset is None or name in option.subset for option in options] for name in self.names]
        return weights * torch.tensor(rows, device=weights.device)

    def check_subset(self, subset: Sequence[str] | None) -> None:
        """Refuse names that aren't members', members that have no weight together, and no name where one is required.

        Raises:
            UnfitItem: Names one that is unknown, and those that are known.
        """
        if subset is None:
            if self.settings.require_subset:
                raise UnfitItem(f"subset: expected names of members, got none; known: {', '.join(self.names)}")
            return
        unknown = sorted(set(subset) - set(self.names))
        if unknown:
            raise UnfitItem(f"subset: unknown member '{unknown[0][:80]}'; known: {', '.join(self.names)}")
        if not self.weights_of([Options(subset=tuple(subset))]).any():
            raise UnfitItem("subset: the settings give its members no weight")

    def _rows(self, batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The arguments of each example of a batch alone; items of a list with no padding for their neighbours."""
        if len(batch) == 1 and isinstance(batch[0], (list, tuple)):
            return [self._arguments(([item],)) for item in batch[0]]
        args = self._arguments(batch)
        count = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 1
        return [
            tuple(arg[i : i + 1] if isinstance(arg, Tensor) and count > 1 else arg for arg in args)
            for i in range(count)
        ]

    def _arguments(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(batch) == 1 and isinstance(batch[0], (list, tuple)):
            examples = [self.task.parse(open_item(item)) for item in batch[0]]
            return self.task.collate(examples)
        return tuple(_move(argument, self.task.place) for argument in batch)

    # --- describing it ---------------------------------------------------------------------------------------

    @property
    def proof(self) -> Proof | None:
        """What the comparison with the members' own forwards showed; None until there was a batch for one."""
        return self.execution.proof

    def fallbacks(self) -> list[str]:
        """What serves in a slower way than the archive was made for; candidates that `auto` merely tried are none."""
        found = ["rows run alone"] if self.alone else []
        refused = {candidate.name for candidate in self.execution.candidates if candidate.refused}
        for name, modes in {"compiled": {"compiled"}, "onnx": {"onnxruntime", "openvino"}}.items():
            if self._packed[name] and modes <= refused:
                found.append(f"{name} refused")
        return found

    def describe(self) -> Description:
        """Members with SHA-256, dtype, device, how the forward is run and why, the proof, labels."""
        labels = self.task.labels
        return Description(
            self.summary(),
            [dataclasses.asdict(member) for member in self.forward.members.members],
            {k: v for k, v in dataclasses.asdict(self.settings).items() if v is not None},
            [labels[index] for index in sorted(labels)],
        )

    def summary(self) -> dict[str, Any]:
        """The description without members, settings and labels: what a log line at the start says."""
        settings = self.settings
        return {
            "ensemble": settings.name,
            "version": __version__,
            "archive": dataclasses.asdict(self.identity) if self.identity else None,
            "architecture": self.task.architecture,
            "size": len(self.names),
            "dtype": settings.dtype,
            "precision": self.precision.summary() if self.precision else None,
            "device": str(self.task.place.device),
            "threads": self.task.place.threads,
            "execution": {
                "asked": settings.execution,
                "serves": self.execution.name,
                "reason": self.execution.reason,
                "candidates": [dataclasses.asdict(candidate) for candidate in self.execution.candidates],
            },
            "equivalence": dataclasses.asdict(self.proof) if self.proof else None,
            "load_s": self.timed.rounded(),
        }


def _move(argument: Any, place: Place) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.to(place.device, place.dtype if argument.is_floating_point() else None)
