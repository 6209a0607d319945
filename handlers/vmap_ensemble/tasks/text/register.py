"""Turns the name of a mode into its class: the one place where text modes are registered."""

from __future__ import annotations

from typing import Any

from vmap_ensemble.tasks.text.embedding import Embedding
from vmap_ensemble.tasks.text.fill_mask import FillMask
from vmap_ensemble.tasks.text.mode import TextMode
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


def mode_class(settings: TextSettings, config: Any) -> type[TextMode]:
    """The class of a mode; of a sequence classification by the settings' or the config's problem type."""
    if settings.mode != "sequence_classification":
        return MODES[settings.mode]
    theirs = {"multi_label_classification": "multi_label", "regression": "regression"}
    kind = settings.problem_type or theirs.get(config.problem_type or "")
    return SEQUENCE_KINDS[kind or ("regression" if config.num_labels == 1 else "single_label")]
