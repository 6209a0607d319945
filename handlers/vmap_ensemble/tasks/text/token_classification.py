"""Turns texts into entities with character offsets, from the members' labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.errors import ItemError
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.classification import abstaining
from vmap_ensemble.tasks.text.inputs import TextInput, read_text_item
from vmap_ensemble.tasks.text.mode import (
    Target,
    TextExample,
    TextMode,
    Window,
    as_number,
    rows_of,
    unknown_target,
)
from vmap_ensemble.tasks.text.tags import Span, SpanJoiner, TagScheme
from vmap_ensemble.tasks.text.windows import is_punctuation, trim


class TokenClassification(TextMode):
    """Labels of words, joined to entities by their tags; a word has the label of its first token.

    A text longer than max_length is read in windows that share doc_stride tokens; a token that two windows hold is
    labelled by the one in which it stands further from the edge.
    """

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.scheme = TagScheme(self.labels.values())

    def read(self, item: Any) -> TextInput:
        """A text."""
        return read_text_item(item, self.settings.max_characters, pairs=False)

    def encode(self, item: Any) -> TextExample:
        """Tokenise; a long text becomes several windows."""
        text = self.read(item)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=False)
        return self.encode_windows(text, True, min(self.settings.doc_stride, room // 2))

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its logits (M, R, S, C) with R windows."""
        owners = rows_of(examples)
        flat, length = self._combine(outputs["logits"], weights[:, owners])
        answers = []
        for b, (option, example) in enumerate(zip(options, examples, strict=True)):
            places = join_windows(example, owners.index(b))
            rows = torch.tensor([row * length + i for row, i in places], device=flat.finite.device)
            answers.append(self._answer(flat, rows, weights[:, b], option, example))
        return answers

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """The entities of the answer, or those of the kinds or places in `entities` that are asked for."""
        flat, length = self._combine(outputs["logits"], weights.expand(-1, len(example.windows)))
        places = join_windows(example)
        rows = torch.tensor([row * length + i for row, i in places], device=flat.finite.device)
        spans = self._spans(flat, rows, example)
        picked = range(len(spans)) if options.target is None else self._picked(spans, options.target)
        return [self._target(spans[i], places, example) for i in picked]

    def _picked(self, spans: list[Span], wanted: Sequence[str | int]) -> list[int]:
        kinds = {tag.kind for tag in map(self.scheme.read, self.labels.values()) if tag.kind is not None}
        picked: set[int] = set()
        for name in wanted:
            number = as_number(name, len(spans))
            if name in kinds or name == "all":
                picked.update(i for i, span in enumerate(spans) if name in (span.kind, "all"))
            elif number is None:
                raise unknown_target(name, f"a place in 'entities', 'all', or one of {', '.join(sorted(kinds))}")
            else:
                picked.add(number)
        return sorted(picked)

    def _target(self, span: Span, places: list[tuple[int, int]], example: TextExample) -> Target:
        # An explanation is of one window: that of the span's first word, and of the words that stand in it.
        window = places[span.places[0][0]][0]
        inside = [(places[i][1], label) for i, label in span.places if places[i][0] == window]
        tokens, labels = (list(axis) for axis in zip(*inside, strict=True))
        return Target(
            self._about(span, example.text.text),
            lambda output: self.summand(output["logits"][:, tokens])[:, range(len(labels)), labels].mean(1),
            window,
        )

    def _combine(self, logits: Tensor, weights: Tensor) -> tuple[ClassPrediction, int]:
        """Each token's prediction, (R * S, ...), and S."""
        members, rows, length, classes = logits.shape
        flat = combine_classes(
            logits.reshape(members, rows * length, classes),
            weights.repeat_interleave(length, dim=1),
            self.settings.aggregation,
            self.settings.temperature,
        )
        return flat, length

    def _spans(self, flat: ClassPrediction, rows: Tensor, example: TextExample) -> list[Span]:
        labels = flat.ranking[rows, 0]
        probabilities = flat.probabilities[rows].gather(-1, labels[:, None])[:, 0].tolist()
        return self.join(example, labels.tolist(), probabilities, flat.mutual_information[rows].tolist())

    def _answer(
        self, flat: ClassPrediction, rows: Tensor, weights: Tensor, options: Options, example: TextExample
    ) -> Answer | ItemError:
        finite = flat.finite[:, rows].all(1)
        ensemble, left_out = self.ensemble_body(options, weights > 0, finite)
        if not ensemble["used"]:
            return self.unusable()
        text = example.text.text
        entities = [self._entity(span, text) for span in self._spans(flat, rows, example)]
        information = flat.mutual_information[rows].tolist()
        mean = sum(information) / max(len(information), 1)
        agreement = flat.agreement[rows].mean().clamp_max(1).item() if information else 1.0
        unsure = [self._abstaining(entity) for entity in entities]
        for entity, reasons in zip(entities, unsure, strict=True):
            if reasons:
                entity["abstain"] = True
        body: dict[str, Any] = {
            "entities": entities,
            "uncertainty": {"mutual_information": mean, "agreement": agreement},
            "ensemble": ensemble,
            "abstain": any(unsure),
        }
        if any(unsure):
            body["abstain_reasons"] = list(dict.fromkeys(reason for reasons in unsure for reason in reasons))
        if options.detail:
            own = flat.member_probabilities[:, rows].max(-1)
            body["members"] = [
                {
                    "name": name,
                    "entities": [
                        self._entity(span, text)
                        for span in self.join(example, own.indices[m].tolist(), own.values[m].tolist(), information)
                    ],
                }
                for m, name in enumerate(self.names)
                if weights[m] > 0 and finite[m]
            ]
        return Answer(body, mean, left_out)

    def _abstaining(self, entity: dict[str, Any]) -> list[str]:
        reasons: list[str] = abstaining(self.settings, entity["probability"], entity["mutual_information"]).get(
            "abstain_reasons", []
        )
        return reasons

    def join(
        self,
        example: TextExample,
        labels: Sequence[int],
        probabilities: Sequence[float],
        information: Sequence[float],
    ) -> list[Span]:
        """Join the words of a text to entities.

        Args:
            example: T tokens over all its windows, without the special ones and each once.
            labels: T numbers of classes.
            probabilities: T, of those classes.
            information: T mutual informations.
        """
        text, joiner = example.text.text, SpanJoiner()
        previous = _Token(None, 0, 0)
        for token, (row, i) in enumerate(join_windows(example)):
            window = example.windows[row]
            current = _Token(window.word_ids[i], *window.offsets[i])
            begins = token == 0 or _begins_word(current, previous, text)
            previous = current
            if not begins:
                joiner.go_on(current.end)
                continue
            label = labels[token]
            span = joiner.word(self.scheme.read(self.labels.get(label, str(label))), current.start, current.end)
            if span is not None:
                span.probabilities.append(probabilities[token])
                span.information.append(information[token])
                span.places.append((token, label))
        return [span for span in joiner.spans if text[span.start : span.end].strip()]

    def _about(self, span: Span, text: str) -> dict[str, Any]:
        start, end = trim(text, span.start, span.end)
        return {"entity": span.kind, "text": text[start:end], "start": start, "end": end}

    def _entity(self, span: Span, text: str) -> dict[str, Any]:
        return {
            **self._about(span, text),
            "probability": sum(span.probabilities) / len(span.probabilities),
            "mutual_information": sum(span.information) / len(span.information),
        }


class _Token(NamedTuple):
    word: int | None
    start: int
    end: int


def _begins_word(token: _Token, previous: _Token, text: str) -> bool:
    """Whether a token is not of the word before it.

    Tokenizers that cut texts at spaces alone, or not at all, give one number to "Berlin.", or to all of a text.
    """
    if token.word != previous.word or text[previous.end : token.start].isspace():
        return True
    own, before = text[token.start : token.end], text[previous.start : previous.end]
    return bool(own and before) and is_punctuation(own) != is_punctuation(before)


def join_windows(example: TextExample, first_row: int = 0) -> list[tuple[int, int]]:
    """Where a text's tokens stand, each once: (row of the window, place in it); the windows' overlaps are halved.

    Args:
        example: Its windows share `overlap` tokens.
        first_row: The row of its first window.
    """
    places = []
    for number, window in enumerate(example.windows):
        real = _real(window)
        left = example.overlap // 2 if number else 0
        right = example.overlap - example.overlap // 2 if number + 1 < len(example.windows) else 0
        places += [(first_row + number, i) for i in real[left : len(real) - right]]
    return places


def _real(window: Window) -> list[int]:
    return [i for i, part in enumerate(window.sequence_ids) if part is not None]
