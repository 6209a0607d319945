"""Turns an archive's settings and tokenizer into a text mode, and joins it with the base handler.

What handlers of encoders have in common, be their members weights (bert_handler) or traced modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.errors import LoadError, RequestError, SettingsError
from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler
from vmap_ensemble.models.transformers import LABELLED_MODES, PRETRAINED_FOLDER
from vmap_ensemble.tasks.answers import Answer, Options, dump_json
from vmap_ensemble.tasks.text.embedding import Embedding
from vmap_ensemble.tasks.text.fill_mask import FillMask
from vmap_ensemble.tasks.text.mode import TextExample, TextMode, pad_windows
from vmap_ensemble.tasks.text.question_answering import QuestionAnswering
from vmap_ensemble.tasks.text.sequence_classification import MultiLabel, Regression, SingleLabel
from vmap_ensemble.tasks.text.settings import TextSettings
from vmap_ensemble.tasks.text.token_classification import TokenClassification

MODES: dict[str, type[TextMode]] = {
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "fill_mask": FillMask,
    "embedding": Embedding,
}
SEQUENCE_KINDS: dict[str, type[TextMode]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "regression": Regression,
}


class TextEnsembleHandler(VmapEnsembleHandler):
    """An ensemble that takes texts; what is asked of them is a mode."""

    settings_class: type[TextSettings] = TextSettings
    lists_are_batches = True

    @property
    def architecture(self) -> str:
        """The transformers class that belongs to the mode."""
        return self.settings.architecture or f"transformers:{self.settings.mode}"

    def prepare_text(self, model: nn.Module | None, config: Any, names: Sequence[str]) -> None:
        """Load the tokenizer and make the mode; called once members are known.

        Args:
            model: The architecture; None for traced members, which take ids and mask alone.
            config: Its transformers config.
            names: The members.
        """
        from transformers import AutoTokenizer  # here: it takes seconds, and image archives never need it

        settings = self.settings
        options = {} if settings.do_lower_case is None else {"do_lower_case": settings.do_lower_case}
        folder = self.folder / PRETRAINED_FOLDER
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, **options)
        if not self.tokenizer.is_fast:
            raise LoadError(f"{PRETRAINED_FOLDER}/: expected a fast tokenizer (tokenizer.json), got a slow one")
        is_labelled = settings.mode in LABELLED_MODES
        if is_labelled and settings.num_labels and settings.num_labels != config.num_labels:
            raise SettingsError(
                f"setup_config.json: num_labels: {settings.num_labels}, but the members have {config.num_labels}"
            )
        labels = read_labels(self.folder) or {int(k): str(v) for k, v in config.id2label.items()}
        self.argument_names = argument_names(model, self.tokenizer.model_input_names)
        self.mode = mode_class(settings, config)(settings, self.tokenizer, labels, names)
        self.pads = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }

    def default_labels(self) -> dict[int, str]:
        """The labels of the members' config."""
        return self.mode.labels

    def parse(self, item: Any) -> TextExample:
        """Read and tokenise one item."""
        return self.mode.parse(item)

    def collate(self, examples: Sequence[TextExample]) -> tuple[Tensor, ...]:
        """Pad the windows of all examples to the longest: one (R, S) int64 tensor per argument of the model."""
        windows = [window for example in examples for window in example.windows]
        return tuple(tensor.to(self.device) for tensor in pad_windows(windows, self.argument_names, self.pads))

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | RequestError]:
        """The mode's answers; TorchServe's plain form is for classifiers."""
        return self.mode.answers(outputs, weights, options, examples)

    def sample_examples(self, count: int) -> list[TextExample]:
        """The mode's own sample items, of different lengths."""
        return [self.mode.encode(item) for item in self.mode.sample_items(count)]

    def sample_request(self) -> bytes:
        """The body of a request with the mode's own sample, to try an archive with."""
        (item,) = self.mode.sample_items(1)
        return dump_json(item if isinstance(item, dict) else {"text": item}).encode()


def mode_class(settings: TextSettings, config: Any) -> type[TextMode]:
    """The class of a mode; of a sequence classification by the settings' or the config's problem type."""
    if settings.mode != "sequence_classification":
        return MODES[settings.mode]
    theirs = {"multi_label_classification": "multi_label", "regression": "regression"}
    kind = settings.problem_type or theirs.get(config.problem_type or "")
    return SEQUENCE_KINDS[kind or ("regression" if config.num_labels == 1 else "single_label")]


def argument_names(model: nn.Module | None, given: Sequence[str]) -> list[str]:
    """The model's leading arguments among those that the tokenizer gives: vmap maps positional ones only."""
    if model is None:
        return ["input_ids", "attention_mask"]
    names = []
    for name in inspect.signature(model.forward).parameters:
        if name not in given:
            break
        names.append(name)
    return names
