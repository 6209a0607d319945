"""Serves an ensemble of Hugging Face encoders: BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, XLM-R and their kin."""

from __future__ import annotations

from typing import Any

from torch import nn

from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.members import StackedMembers
from vmap_ensemble.text_handler import TextEnsembleHandler


class BertEnsembleHandler(TextEnsembleHandler):
    """Members written by save_pretrained; the mode says what is asked of the text."""

    def build_model(self) -> nn.Module:
        """The transformers class of the mode, from the archive's config."""
        model = super().build_model()
        self.prepare_text(model, model.config, [member.name for member in self.archive.members])
        return model

    def join(self, model: Any, members: StackedMembers) -> EnsembleForward:
        """One vmapped forward that computes no padding, where the architecture permits."""
        from vmap_ensemble.encoder import build_encoder_forward  # here: it imports transformers

        return build_encoder_forward(model, members)
