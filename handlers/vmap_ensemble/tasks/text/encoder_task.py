"""Turns members that save_pretrained wrote into one forward of encoders, and texts into answers and explanations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vmap_ensemble.archive.precision import Precision
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import NotOffered, TooLargeItem
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.task import Asked, Place
from vmap_ensemble.tasks.text.mode import Target
from vmap_ensemble.tasks.text.task import TextTask, argument_names
from vmap_ensemble.tasks.text.windows import TextExample, positions_of, vocabulary_of

if TYPE_CHECKING:
    from vmap_ensemble.tasks.text.explanations.explainer import Explainer


class EncoderTask(TextTask):
    """Members written by save_pretrained; the mode says what is asked of the text."""

    calibrates = False

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place = settings, place
        self._model: Any = super().build_model()
        super().__init__(settings, place, self._model.config, positions_of(self._model), vocabulary_of(self._model))
        self.argument_names = argument_names(self._model.forward, self.tokenizer.model_input_names)

    def build_model(self) -> nn.Module:
        """The transformers class of the mode, from the archive's config."""
        return cast(nn.Module, self._model)

    def join(self, model: Any, members: StackedMembers) -> EnsembleForward:
        """One vmapped forward that computes no padding, where the architecture permits."""
        from vmap_ensemble.encoders.build import build_encoder_forward  # here: it imports transformers

        forward = build_encoder_forward(model, members)
        if self.settings.captum_explanation and self.settings.embedding_name and self.mode.explains:
            self._make_explainer(forward)  # a wrong name is found here and not at the first explanation
        return forward

    def quantise(self, forward: Forward, precision: Precision | None) -> Forward:
        """Weights rounded once, rows when they come: nothing is calibrated.

        Raises:
            LoadError: The kernel doesn't take the encoder's layers, or there is none for this CPU.
        """
        from vmap_ensemble.encoders.quantised import quantise_encoder  # here: it imports transformers

        return quantise_encoder(forward, self.collate(self.sample_examples(1)))

    def _make_explainer(self, forward: Any) -> Explainer:
        from vmap_ensemble.tasks.text.explanations.explainer import make_explainer  # here: it imports transformers

        return make_explainer(self.mode, forward, self.argument_names, self.pads["input_ids"])

    def explain(
        self, asked: Asked, examples: Sequence[TextExample], options: Sequence[Options]
    ) -> list[dict[str, Any]]:
        """What each word adds to the answer to each text.

        Raises:
            ItemError: Explanations are off, the mode has none, or too many are asked for at once.
        """
        if not self.settings.captum_explanation:
            raise NotOffered("explanations are switched off (captum_explanation is false)")
        limit = self.settings.max_explanations
        targets: list[list[Target]] = []
        for example, option in zip(examples, options, strict=True):
            targets.append(self._targets(asked, example, option))
            count = max(len(examples), sum(map(len, targets)))
            if count > limit:
                raise TooLargeItem(f"at least {count} explanations; at most {limit} per request: set 'target'")
        explain = self._make_explainer(asked.forward)
        return [
            explain(example, own, asked.weights_of([option])[:, 0], option)
            for example, own, option in zip(examples, targets, options, strict=True)
        ]

    @torch.inference_mode()
    def _targets(self, asked: Asked, example: TextExample, option: Options) -> list[Target]:
        outputs = asked.run(*self.collate([example]))
        return self.mode.targets(outputs, asked.weights_of([option]), option, example)
