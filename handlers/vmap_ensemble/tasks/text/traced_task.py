"""Turns traced FasterTransformer (EFFT) modules and their library into one forward, with the encoders' modes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from vmap_ensemble.archive.manifest import check_hashes
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.traced.answers import prove_traced, read_answers
from vmap_ensemble.encoders.traced.forward import TracedForward
from vmap_ensemble.encoders.traced.library import accepts_token_types, load_ft_library, load_traced
from vmap_ensemble.errors import NotOffered, SettingsError
from vmap_ensemble.execution.modes import Execution
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER, read_config
from vmap_ensemble.process import phases
from vmap_ensemble.process.phases import Phases
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.task import Asked, Place
from vmap_ensemble.tasks.text.mode import TextExample
from vmap_ensemble.tasks.text.settings import TracedSettings
from vmap_ensemble.tasks.text.task import TextTask

TRACED_MODES = ("sequence_classification", "token_classification", "question_answering")


class TracedTask(TextTask):
    """Members are TorchScript files that call torch.classes.FasterTransformer.Encoder of the archive's library."""

    settings_class = TracedSettings

    def __init__(self, settings: Settings, place: Place) -> None:
        mode = getattr(settings, "mode", "")
        if mode not in TRACED_MODES:
            raise SettingsError(
                f"setup_config.json: mode: expected one of {', '.join(TRACED_MODES)} for traced members, got "
                f"'{mode}'; serve the checkpoints with bert_handler.py"
            )
        folder = place.folder
        if folder is None:
            raise SettingsError("traced members lie in an archive; expected one, got members in memory")
        super().__init__(settings, place, read_config(folder / PRETRAINED_FOLDER, PRETRAINED_FOLDER))
        self.argument_names = ["input_ids", "attention_mask"]

    def make_forward(self, timed: Phases) -> TracedForward:
        """Load the library, then the traced members."""
        folder, rows = self._folder(), self.place.manifest.members
        check_hashes(folder, self.place.manifest)
        with timed(phases.LIBRARY):
            load_ft_library(folder / self.settings.library)
        with timed(phases.STACK):
            modules = [load_traced(folder / row.file, self.place.device) for row in rows]
        if all(accepts_token_types(module) for module in modules):
            self.argument_names = [*self.argument_names, "token_type_ids"]
        return TracedForward(modules, StackedMembers(self.place.names, {}, {}, members=rows))

    def only_execution(self, forward: Any) -> Execution:
        """The one way to run, proved against what the members' checkpoints answered when they were traced."""
        reason = forward.reason
        files = [self._folder() / row.file for row in self.place.manifest.members]
        recorded = [answers for answers in map(read_answers, files) if answers is not None]
        if len(recorded) < len(files):
            told = "the files hold no answers of their checkpoints to be proved against"
            return Execution("traced", f"{reason}; {told}", [], forward)
        started = time.perf_counter()
        with torch.inference_mode():
            proof = prove_traced(forward, recorded, len(self.argument_names), self.settings.tolerance)
        return Execution("traced", reason, [], forward, proof, time.perf_counter() - started)

    def explain(
        self, asked: Asked, examples: Sequence[TextExample], options: Sequence[Options]
    ) -> list[dict[str, Any]]:
        """Traced modules give no gradients with respect to their embeddings."""
        raise NotOffered("traced modules can't be explained; serve the checkpoints with bert_handler.py")
