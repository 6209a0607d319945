"""Turns one text and its targets into the JSON of an explanation: words and what each adds to every target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import share_weights
from vmap_ensemble.encoders.forward import EncoderForward
from vmap_ensemble.tasks.answers import Options, significant
from vmap_ensemble.tasks.text.explanations.attribution import (
    Attribution,
    EncodedText,
    MemberAttribution,
    find_embeddings,
)
from vmap_ensemble.tasks.text.mode import Target, TextExample, TextMode, Window, pad_windows


@dataclass(frozen=True)
class Word:
    """A word of one of an item's texts: its tokens, and what the answer says of it."""

    tokens: list[int]
    row: dict[str, Any]


class Explainer:
    """Explains what an ensemble says of texts, member by member.

    Args:
        mode: Says what can be explained.
        attribute: Computes one member's attributions.
        argument_names: The model's leading arguments.
        padding_id: Token that stands for words in the baseline.
    """

    def __init__(
        self, mode: TextMode, attribute: MemberAttribution, argument_names: Sequence[str], padding_id: int
    ) -> None:
        self.mode, self.attribute, self.argument_names = mode, attribute, tuple(argument_names)
        self.padding_id = padding_id

    def __call__(
        self, example: TextExample, targets: Sequence[Target], weights: Tensor, options: Options
    ) -> dict[str, Any]:
        """Explain the targets of one text.

        Args:
            example: The text.
            targets: What the mode found in it.
            weights: (M,) of the members, 0 for those outside the subset.
            options: `detail` gives each member's own importances as well.

        Returns:
            The body of the answer: `explains`, `explanations` with `words` and `importances`, and `ensemble`.

        Raises:
            ItemError: where no member gave finite scores.
        """
        texts = {target.window: self._encode(example.windows[target.window]) for target in targets}
        asked = weights > 0
        members = asked.nonzero().flatten().tolist()
        # One row per target: member -> what its tokens add.
        own = [{m: self.attribute(m, texts[target.window], target.score) for m in members} for target in targets]
        finite = torch.tensor([all(is_finite(row[m]) for row in own if m in row) for m in range(len(weights))])
        ensemble, _ = self.mode.ensemble_body(options, asked, finite)
        if not ensemble["used"]:
            raise self.mode.unusable()
        share = share_weights(weights.cpu()[:, None], finite[:, None])[:, 0].tolist()
        rows = [
            self._row(target, example, {m: row[m] for m in members if share[m] > 0}, share, options)
            for target, row in zip(targets, own, strict=True)
        ]
        return significant({"explains": self.mode.explains, "explanations": rows, "ensemble": ensemble})

    def _encode(self, window: Window) -> EncodedText:
        """The text and its baseline, whose words are padding; marks that the tokenizer added, and masks, stay."""
        tensors = pad_windows([window], self.argument_names, {})
        ids, mask, *types = (tensor.to(self.attribute.device) for tensor in tensors)
        kept = torch.tensor([part is None for part in window.sequence_ids], device=ids.device)
        keep = kept | (ids == self.mode.kept_token)
        baseline = torch.where(keep, ids, self.padding_id)
        return EncodedText(ids, baseline, mask, types[0] if types else None)

    def _row(
        self,
        target: Target,
        example: TextExample,
        own: dict[int, Attribution],
        share: list[float],
        options: Options,
    ) -> dict[str, Any]:
        words = find_words(example.windows[target.window], example, self.mode.fields)
        mixed = mix(own, share)
        row = {**target.row, **_numbers(mixed, words), "words": [word.row for word in words]}
        if options.detail:
            names = self.mode.names
            row["members"] = [{"name": names[m], **_numbers(one, words)} for m, one in own.items()]
        return row


def make_explainer(
    mode: TextMode, forward: EncoderForward, argument_names: Sequence[str], padding_id: int
) -> Explainer:
    """The explainer of an archive, with the module and the steps that its settings name.

    Raises:
        SettingsError: The settings name no embeddings that the model has.
    """
    settings = mode.settings
    layer = find_embeddings(forward.model, settings.embedding_name)
    attribute = MemberAttribution(forward, layer, settings.explanation_steps, settings.explanation_batch_size)
    return Explainer(mode, attribute, argument_names, padding_id)


def is_finite(attribution: Attribution) -> bool:
    """Whether a member's score of text and baseline, and what its tokens add, are finite numbers."""
    return math.isfinite(attribution.value - attribution.baseline) and math.isfinite(attribution.delta)


def mix(own: Mapping[int, Attribution], share: Sequence[float]) -> Attribution:
    """The ensemble's attribution: the members' weighted sum, since integrated gradients are linear."""
    return Attribution(
        tokens=torch.stack([share[m] * one.tokens for m, one in own.items()]).sum(0),
        value=sum(share[m] * one.value for m, one in own.items()),
        baseline=sum(share[m] * one.baseline for m, one in own.items()),
        delta=sum(share[m] * one.delta for m, one in own.items()),
    )


def _numbers(attribution: Attribution, words: Sequence[Word]) -> dict[str, Any]:
    tokens = attribution.tokens.tolist()
    return {
        "value": attribution.value,
        "baseline": attribution.baseline,
        "delta": attribution.delta,
        "importances": [sum(tokens[i] for i in word.tokens) for word in words],
    }


def find_words(window: Window, example: TextExample, fields: tuple[str, str]) -> list[Word]:
    """The words of a window, made of the tokens that the tokenizer cut them into.

    Args:
        window: Its tokens.
        example: What was read.
        fields: What a request calls the first and the second text.
    """
    tokens: dict[tuple[int, int], list[int]] = {}
    for i, (part, word) in enumerate(zip(window.sequence_ids, window.word_ids, strict=True)):
        if part is not None:
            # A tokenizer that knows no words has tokens instead, numbered so that they are no word's.
            tokens.setdefault((part, -1 - i if word is None else word), []).append(i)
    words = []
    for (part, _), own in tokens.items():
        start, end = window.offsets[own[0]][0], window.offsets[own[-1]][1]
        text = (example.text.pair or "") if part else example.text.text
        words.append(Word(own, {"word": text[start:end], "start": start, "end": end, "of": fields[part]}))
    return words
