"""Turns an unpacked archive into a forward of its members that is chosen, proved and ready to be asked.

settings -> architecture + stacked members -> way to run them -> proof           seconds of each phase
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from ts.torch_handler.base_handler import BaseHandler

from vmap_ensemble import __version__
from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.archive.manifest import load_members, read_manifest
from vmap_ensemble.archive.precision import Precision, read_precision
from vmap_ensemble.archive.settings import Settings, load_settings
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.core.proof import Proof
from vmap_ensemble.core.states import check_architecture
from vmap_ensemble.errors import EnsembleError, SettingsError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.chunking import ChunkedRun
from vmap_ensemble.execution.compiled.packages import COMPILED_FILE, CompiledForward
from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.modes import Execution, ExecutionOptions, prove
from vmap_ensemble.frontends.torchserve.metrics import Metrics
from vmap_ensemble.frontends.torchserve.worker import quieten_worker, threads_per_worker
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.process.age import seconds_since_process_start
from vmap_ensemble.process.cache import CACHE
from vmap_ensemble.process.device import DTYPES, choose_device, choose_dtype, configure_torch
from vmap_ensemble.process.memory import freed_memory_returned
from vmap_ensemble.process.threads import cores_at_hand
from vmap_ensemble.tasks.classification import ClassAnswers

logger = logging.getLogger(__name__)

SAMPLE_BATCH = 2


class LoadedEnsemble(BaseHandler):
    """The start of a worker: everything of `VmapEnsembleHandler` but its requests.

    Attributes:
        settings_class: The settings that this handler knows; override for options of your own.
        default_architecture: What is built where the settings name no architecture.
        default_input_shape: Shape of one example where the settings give none.
        threads_from_bytes: Size of a batch's files and texts from which `parse` is called for several items at a
            time, one per core: worth it where items cost most of their time outside of Python. None: never.
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
    threads_from_bytes: int | None = None
    settings: Any
    forward: EnsembleForward
    proof: Proof
    execution: Execution
    precision: Precision | None

    # --- what a handler of your own may override ---------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The architecture in eval mode; its weights don't matter, the members' are used."""
        return build_architecture(self.architecture, self.settings.num_classes, self.folder)

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

    # --- the phases of a start -------------------------------------------------------------------------------

    def initialize(self, context: Any) -> None:
        """Load the archive that TorchServe has unpacked, and prove that its forward is right.

        Raises:
            EnsembleError: The archive can't be served; the log has one line that says why.
        """
        self.context = context
        self.manifest = context.manifest
        self.phases_s: dict[str, float] = {"import": seconds_since_process_start()}
        try:
            with freed_memory_returned():
                self._load(context)
        except EnsembleError as error:
            logger.error("cannot serve %s: %s", context.model_name, error)
            raise
        self.initialized = True
        self.metrics.flush()
        quieten_worker()
        logger.info("ready: %s", json.dumps(self._summary()))

    def _load(self, context: Any) -> None:
        self.folder = Path(context.system_properties["model_dir"])
        config = context.model_yaml_config or {}
        with self._phase("settings"):
            self.settings = load_settings(self.folder, self.settings_class, config.get("handler"))
            self.threads = self.settings.threads or threads_per_worker(config, cores_at_hand())
            configure_torch(self.threads, self.settings.float32_matmul_precision)
            self.device = choose_device(self.settings.device, context.system_properties.get("gpu_id"))
            self.dtype = choose_dtype(self.settings.dtype, self.device)
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
        self.parsers = MemberThreads(1 if self.threads_from_bytes is None else self.threads)

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
