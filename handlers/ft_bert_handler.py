"""Serves an ensemble of traced FasterTransformer (EFFT) modules, with the modes and answers of the BERT handler."""

from __future__ import annotations

from typing import Any

from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.traced.forward import TracedForward
from vmap_ensemble.encoders.traced.library import accepts_token_types, load_ft_library, load_traced
from vmap_ensemble.errors import RequestError, SettingsError
from vmap_ensemble.execution.modes import Execution
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER, read_config
from vmap_ensemble.serving.requests import Request
from vmap_ensemble.tasks.text.settings import TracedSettings
from vmap_ensemble.tasks.text.task import TextEnsembleHandler

TRACED_MODES = ("sequence_classification", "token_classification", "question_answering")


class FTBertHandler(TextEnsembleHandler):
    """Members are TorchScript files that call torch.classes.FasterTransformer.Encoder of the archive's library."""

    settings_class = TracedSettings

    def load_forward(self) -> TracedForward:  # type: ignore[override]
        """Load the library, then the traced members, then the tokenizer."""
        if self.settings.mode not in TRACED_MODES:
            raise SettingsError(
                f"setup_config.json: mode: expected one of {', '.join(TRACED_MODES)} for traced members, got "
                f"'{self.settings.mode}'; serve the checkpoints with bert_handler.py"
            )
        with self._phase("library"):
            load_ft_library(self.folder / self.settings.library)
        rows = self.archive.members
        with self._phase("stack"):
            modules = [load_traced(self.folder / row.file, self.device) for row in rows]
        members = StackedMembers(tuple(row.name for row in rows), {}, {}, members=rows)
        with self._phase("prepare"):
            config = read_config(self.folder / PRETRAINED_FOLDER, PRETRAINED_FOLDER)
            self.prepare_text(None, config, members.names)
        if all(accepts_token_types(module) for module in modules):
            self.argument_names.append("token_type_ids")
        return TracedForward(modules, members)

    def choose_execution(self, config: dict[str, Any]) -> None:
        """Traced members have one way to run."""
        self.execution = Execution("traced", "traced modules, one after another", [], self.forward)
        self.run = self.chunked(self.execution)

    def explain_request(self, request: Request) -> Any:
        """Traced modules give no gradients with respect to their embeddings."""
        raise RequestError(501, "traced modules can't be explained; serve the checkpoints with bert_handler.py")
