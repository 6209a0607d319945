"""Turns texts with masked words into the words that the members would put there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.aggregate import combine_classes
from vmap_ensemble.classification import Answer
from vmap_ensemble.errors import RequestError
from vmap_ensemble.requests import Options
from vmap_ensemble.text_mode import TextExample, TextMode
from vmap_ensemble.text_requests import TextInput, read_text_item


class FillMask(TextMode):
    """The most probable tokens for every mask of a text."""

    def read(self, item: Any) -> TextInput:
        """A text with at least one mask."""
        text = read_text_item(item, self.settings.max_characters).text
        if self.tokenizer.mask_token not in text:
            raise RequestError(422, f"the text has no {self.tokenizer.mask_token} to fill")
        return TextInput(text)

    def encode(self, item: Any) -> TextExample:
        """Tokenise; a mask that max_length cuts off is refused."""
        example = super().encode(item)
        if self.tokenizer.mask_token_id not in example.windows[0].arrays["input_ids"]:
            raise RequestError(422, f"{self.tokenizer.mask_token} is beyond the first {self.max_length} tokens")
        return example

    def sample_items(self, count: int) -> list[Any]:
        """Texts with one mask."""
        return [f"a {self.tokenizer.mask_token}" + " sample" * (index % 4) for index in range(count)]

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | RequestError]:
        """Answer a batch from its logits (M, B, S, V); only the masks' rows are combined."""
        logits = outputs["logits"]
        places = [
            (b, i)
            for b, example in enumerate(examples)
            for i, token in enumerate(example.windows[0].arrays["input_ids"])
            if token == self.tokenizer.mask_token_id
        ]
        rows, columns = (torch.tensor(axis, device=logits.device) for axis in zip(*places, strict=True))
        settings = self.settings
        masks = combine_classes(
            logits[:, rows, columns], weights[:, rows], settings.aggregation, settings.temperature
        )
        answers: list[Answer | RequestError] = []
        for b, option in enumerate(options):
            own = [k for k, (row, _) in enumerate(places) if row == b]
            finite = masks.finite[:, own].all(1)
            ensemble, left_out = self.ensemble_body(option, weights[:, b] > 0, finite)
            if not ensemble["used"]:
                answers.append(self.unusable())
                continue
            count = option.top_k or self.settings.top_k
            information = masks.mutual_information[own].mean().item()
            body: dict[str, Any] = {
                "masks": [self._mask(masks.probabilities[k], masks.ranking[k, :count]) for k in own],
                "uncertainty": {
                    "predictive_entropy": masks.predictive_entropy[own].mean().item(),
                    "expected_entropy": masks.expected_entropy[own].mean().item(),
                    "mutual_information": information,
                    "agreement": masks.agreement[own].mean().item(),
                },
                "ensemble": ensemble,
            }
            if option.detail:
                body["members"] = [
                    {"name": name, "masks": [self._mask(p, p.argmax(-1, keepdim=True))[0] for p in own_rows]}
                    for m, name in enumerate(self.names)
                    if weights[m, b] > 0 and finite[m]
                    for own_rows in [masks.member_probabilities[m, own]]
                ]
            answers.append(Answer(body, information, left_out))
        return answers

    def _mask(self, probabilities: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
        rows = zip(tokens.tolist(), probabilities[tokens].tolist(), strict=True)
        return [{"token": self.tokenizer.decode([t]).strip(), "index": t, "probability": p} for t, p in rows]
