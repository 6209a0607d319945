"""Turns the name of a text mode into the class that answers it (models/text_modes.py has the names)."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, cast

from vmap_ensemble.models.text_modes import TEXT_MODES
from vmap_ensemble.tasks.text.mode import TextMode
from vmap_ensemble.tasks.text.settings import TextSettings


def mode_class(settings: TextSettings, config: Any) -> type[TextMode]:
    """The class of a mode; where it depends on settings and the members' config, as those say."""
    answers: Any = TEXT_MODES[settings.mode].answers
    if isinstance(answers, str):
        module, _, name = answers.partition(":")
        answers = getattr(importlib.import_module(module), name)
    return cast(type[TextMode], answers if inspect.isclass(answers) else answers(settings, config))
