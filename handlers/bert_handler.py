"""Serves an ensemble of Hugging Face encoders: BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, XLM-R and their kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.requests import Request, wrap_answers
from vmap_ensemble.tasks.answers import Options
from vmap_ensemble.tasks.text.mode import Target, TextExample
from vmap_ensemble.tasks.text.task import TextEnsembleHandler

if TYPE_CHECKING:
    from vmap_ensemble.tasks.text.explanations.explainer import Explainer


class BertEnsembleHandler(TextEnsembleHandler):
    """Members written by save_pretrained; the mode says what is asked of the text."""

    def build_model(self) -> nn.Module:
        """The transformers class of the mode, from the archive's config."""
        model = super().build_model()
        self.prepare_text(model, model.config, [member.name for member in self.archive.members])
        return model

    def join(self, model: Any, members: StackedMembers) -> EnsembleForward:
        """One vmapped forward that computes no padding, where the architecture permits."""
        from vmap_ensemble.encoders.build import build_encoder_forward  # here: it imports transformers

        forward = build_encoder_forward(model, members)
        if self.settings.captum_explanation and self.settings.embedding_name and self.mode.explains:
            self._make_explainer(forward)  # a wrong name is found here and not at the first explanation
        return forward

    def _make_explainer(self, forward: Any) -> Explainer:
        from vmap_ensemble.tasks.text.explanations.explainer import make_explainer  # here: it imports transformers

        return make_explainer(self.mode, forward, self.argument_names, self.pads["input_ids"])

    def explain_request(self, request: Request) -> Any:
        """What each word adds to the answer to each item.

        Raises:
            RequestError: 501 where explanations are off or the mode has none, 413 for too many; as for predictions.
        """
        if not self.settings.captum_explanation:
            raise RequestError(501, "explanations are switched off (captum_explanation is false)")
        request, examples = self.read_examples(request)
        limit = self.settings.max_explanations
        targets = []
        for example in examples:
            targets.append(self._targets(example, request.options))
            asked = max(len(examples), sum(map(len, targets)))
            if asked > limit:
                raise RequestError(413, f"at least {asked} explanations; at most {limit} per request: set 'target'")
        explain = self._make_explainer(self.forward)
        weights = self.weights_of([request.options])[:, 0]
        bodies = [
            explain(example, own, weights, request.options) for example, own in zip(examples, targets, strict=True)
        ]
        return wrap_answers(request, bodies, self.settings.name)

    @torch.inference_mode()
    def _targets(self, example: TextExample, options: Options) -> list[Target]:
        outputs = self.run(*self.collate([example]))
        return self.mode.targets(outputs, self.weights_of([options]), options, example)
