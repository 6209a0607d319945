"""Turns texts with masked words into the words that the members would put there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import combine_classes
from vmap_ensemble.errors import ItemError, UnfitItem
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.classification import abstaining
from vmap_ensemble.tasks.text.inputs import TextInput, read_text_item
from vmap_ensemble.tasks.text.mode import Target, TextExample, TextMode, as_number, unknown_target


class FillMask(TextMode):
    """The most probable tokens for every mask of a text."""

    @property
    def kept_token(self) -> int:  # type: ignore[override]
        """The mask: without one there is nothing to fill."""
        return int(self.tokenizer.mask_token_id)

    def read(self, item: Any) -> TextInput:
        """A text with at least one mask."""
        text = read_text_item(item, self.settings.max_characters, pairs=False).text
        if self.tokenizer.mask_token not in text:
            raise UnfitItem(f"the text has no {self.tokenizer.mask_token} to fill")
        return TextInput(text)

    def encode(self, item: Any) -> TextExample:
        """Tokenise; a mask that max_length cuts off is refused."""
        example = super().encode(item)
        if self.tokenizer.mask_token_id not in example.windows[0].arrays["input_ids"]:
            raise UnfitItem(f"{self.tokenizer.mask_token} is beyond the first {self.max_length} tokens")
        return example

    def sample_items(self, count: int) -> list[Any]:
        """Texts with one mask."""
        return [f"a {self.tokenizer.mask_token}" + " sample" * (index % 4) for index in range(count)]

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
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
        answers: list[Answer | ItemError] = []
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
                    "agreement": masks.agreement[own].mean().clamp_max(1).item(),
                },
                "ensemble": ensemble,
                **abstaining(settings, masks.ranked_probabilities[own, 0].min().item(), information),
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

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """For every mask the most probable token, or the tokens that are asked for."""
        ids = example.windows[0].arrays["input_ids"]
        places = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        settings = self.settings
        logits = outputs["logits"][:, 0, places]
        masks = combine_classes(logits, weights.expand(-1, len(places)), settings.aggregation, settings.temperature)
        wanted = None if options.target is None else [self._token(name, logits.shape[-1]) for name in options.target]
        return [
            self._target(number, place, token)
            for number, place in enumerate(places)
            for token in (wanted or [int(masks.ranking[number, 0])])
        ]

    def _token(self, name: str | int, count: int) -> int:
        """A token of the vocabulary by its text, at a word's beginning if it is one there, or by its number."""
        if isinstance(name, str):
            for text in (f" {name}", name):
                encoded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(encoded) == 1 and encoded[0] != self.tokenizer.unk_token_id:
                    return int(encoded[0])
        number = as_number(name, count)
        if number is None:
            raise unknown_target(name, "one token of the vocabulary or its number")
        return number

    def _target(self, number: int, place: int, token: int) -> Target:
        about = {"mask": number, "token": self.tokenizer.decode([token]).strip(), "index": token}
        return Target(about, lambda output: self.summand(output["logits"][:, place])[:, token])

    def _mask(self, probabilities: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
        rows = zip(tokens.tolist(), probabilities[tokens].tolist(), strict=True)
        return [{"token": self.tokenizer.decode([t]).strip(), "index": t, "probability": p} for t, p in rows]
