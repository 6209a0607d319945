"""Turns texts into one normalised vector each, and how far the members' vectors spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmap_ensemble.core.aggregate import share_weights
from vmap_ensemble.errors import ItemError
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.text.inputs import TextInput, read_text_item
from vmap_ensemble.tasks.text.mode import TextExample, TextMode


class Embedding(TextMode):
    """The mean of the members' normalised vectors, normalised; spread is 1 - its mean cosine to theirs."""

    @property
    def explains(self) -> str:
        """Nothing: a vector has no class that words could speak for."""
        return ""

    def read(self, item: Any) -> TextInput:
        """A text, or a pair."""
        return read_text_item(item, self.settings.max_characters)

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its last hidden states (M, B, S, H)."""
        hidden = outputs["last_hidden_state"].float()
        own = normalize(self._pool(hidden, examples), dim=-1)
        finite, asked = own.isfinite().all(-1), weights > 0
        own = torch.where(finite[..., None], own, 0.0)
        share = share_weights(weights, finite)
        mean = normalize(torch.einsum("mb,mbh->bh", share, own), dim=-1)
        cosine = torch.einsum("mbh,bh->mb", own, mean).clamp(-1, 1)
        spread = (1 - (share * cosine).sum(0)).clamp_min(0).tolist()
        return self.answer_each(
            options,
            asked,
            finite,
            lambda b: {"embedding": mean[b].tolist(), "uncertainty": {"spread": spread[b]}},
            lambda m, b: {"cosine": cosine[m, b].item()},
        )

    def _pool(self, hidden: Tensor, examples: Sequence[TextExample]) -> Tensor:
        """(M, B, S, H) -> (M, B, H): the mean over real tokens, or the first token's."""
        if self.settings.pooling == "cls":
            return hidden[:, :, 0]
        lengths = torch.tensor([len(example.windows[0]) for example in examples], device=hidden.device)
        real = torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None]
        # where, not a product: padding may hold anything, NaN times 0 is NaN
        return torch.where(real[..., None], hidden, 0.0).sum(2) / lengths[:, None]
