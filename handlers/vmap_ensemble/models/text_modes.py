"""What may be asked of a text: each mode with the transformers class it needs and the class that answers.

    register_text_mode("spans", "AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING", "mine:Spans")

The names stand here, below all that uses them, so that a setting is checked without importing transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmap_ensemble.errors import SettingsError

DEFAULT_MODE = "sequence_classification"
_TASKS = "vmap_ensemble.tasks.text"


@dataclass(frozen=True)
class TextModeRow:
    """One mode.

    Attributes:
        auto_class: transformers' class that builds its models.
        mapping: transformers' table of configuration class -> model class of it.
        answers: A subclass of TextMode, a function (settings, config) -> such a class, or `module:name` of either.
        is_labelled: Whether its members have labels; a config has a number of them even where there are none.
    """

    auto_class: str
    mapping: str
    answers: str | Callable[..., Any]
    is_labelled: bool = False


TEXT_MODES: dict[str, TextModeRow] = {
    "sequence_classification": TextModeRow(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        f"{_TASKS}.sequence_classification:kind_of_classification",
        is_labelled=True,
    ),
    "token_classification": TextModeRow(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
        f"{_TASKS}.token_classification:TokenClassification",
        is_labelled=True,
    ),
    "question_answering": TextModeRow(
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
        f"{_TASKS}.question_answering:QuestionAnswering",
    ),
    "fill_mask": TextModeRow("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", f"{_TASKS}.fill_mask:FillMask"),
    "embedding": TextModeRow("AutoModel", "MODEL_MAPPING", f"{_TASKS}.embedding:Embedding"),
}


def register_text_mode(
    name: str, auto_class: str, mapping: str, answers: str | Callable[..., Any], is_labelled: bool = False
) -> None:
    """Add a mode; the arguments are the attributes of `TextModeRow`.

    Raises:
        SettingsError: There is one of this name.
    """
    if name in TEXT_MODES:
        raise SettingsError(f"mode '{name}': expected a new name; known: {', '.join(TEXT_MODES)}")
    TEXT_MODES[name] = TextModeRow(auto_class, mapping, answers, is_labelled)


def is_labelled(mode: str) -> bool:
    """Whether members of a mode have labels."""
    return mode in TEXT_MODES and TEXT_MODES[mode].is_labelled


def reason_against_mode(name: str) -> str | None:
    """What is wrong with the setting `mode`, with the known names and the nearest; None if it's one of them."""
    if name in TEXT_MODES:
        return None
    close = difflib.get_close_matches(name, TEXT_MODES, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"expected one of {', '.join(TEXT_MODES)}, got '{name}'{hint}"
