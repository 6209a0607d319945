"""Turns texts into entities with character offsets, from the members' labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmap_ensemble.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.classification import Answer
from vmap_ensemble.errors import RequestError
from vmap_ensemble.requests import Options
from vmap_ensemble.text_mode import TextExample, TextMode, Window
from vmap_ensemble.text_requests import TextInput, read_text_item

OUTSIDE = ("O", "")


@dataclass
class Span:
    """An entity while its tokens are gathered."""

    kind: str
    start: int
    end: int
    probabilities: list[float]
    information: list[float]


class TokenClassification(TextMode):
    """Labels of words, joined to entities by BIO (or plain) tags; a word has the label of its first token."""

    def read(self, item: Any) -> TextInput:
        """A text."""
        text = read_text_item(item, self.settings.max_characters)
        return TextInput(text.text)

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | RequestError]:
        """Answer a batch from its logits (M, B, S, C)."""
        logits = outputs["logits"]
        members, batch, length, classes = logits.shape
        flat = combine_classes(
            logits.reshape(members, batch * length, classes),
            weights.repeat_interleave(length, dim=1),
            self.settings.aggregation,
            self.settings.temperature,
        )
        return [self._answer(flat, b, length, weights[:, b], option, examples[b]) for b, option in enumerate(options)]

    def _answer(
        self, flat: ClassPrediction, b: int, length: int, weights: Tensor, options: Options, example: TextExample
    ) -> Answer | RequestError:
        (window,) = example.windows
        rows = slice(b * length, b * length + len(window))
        finite = flat.finite[:, rows].all(1)
        ensemble, left_out = self.ensemble_body(options, weights > 0, finite)
        if not ensemble["used"]:
            return self.unusable()
        labels = flat.ranking[rows, 0]
        probabilities = flat.probabilities[rows].gather(-1, labels[:, None])[:, 0].tolist()
        information = flat.mutual_information[rows].tolist()
        spans = self.join(window, labels.tolist(), probabilities, information)
        real = [i for i, word in enumerate(window.word_ids) if word is not None]
        mean = sum(information[i] for i in real) / max(len(real), 1)
        agreement = flat.agreement[rows][real].mean().item() if real else 1.0
        body: dict[str, Any] = {
            "entities": [self._entity(span, example.text.text) for span in spans],
            "uncertainty": {"mutual_information": mean, "agreement": agreement},
            "ensemble": ensemble,
        }
        if options.detail:
            own = flat.member_probabilities[:, rows].max(-1)
            body["members"] = [
                {
                    "name": name,
                    "entities": [
                        self._entity(span, example.text.text)
                        for span in self.join(window, own.indices[m].tolist(), own.values[m].tolist(), information)
                    ],
                }
                for m, name in enumerate(self.names)
                if weights[m] > 0 and finite[m]
            ]
        return Answer(body, mean, left_out)

    def join(
        self, window: Window, labels: Sequence[int], probabilities: Sequence[float], information: Sequence[float]
    ) -> list[Span]:
        """Join the words of a window to entities: B- begins one, I- of the same kind goes on."""
        spans: list[Span] = []
        open_span: Span | None = None
        previous_word: int | None = None
        for i, word in enumerate(window.word_ids):
            if word is None:
                previous_word = None
                continue
            start, end = window.offsets[i]
            if word == previous_word:
                if open_span is not None:
                    open_span.end = end
                continue
            previous_word = word
            prefix, kind = split_tag(self.labels.get(labels[i], str(labels[i])))
            if kind in OUTSIDE:
                open_span = None
            elif open_span is not None and open_span.kind == kind and prefix != "B":
                open_span.end = end
                open_span.probabilities.append(probabilities[i])
                open_span.information.append(information[i])
            else:
                open_span = Span(kind, start, end, [probabilities[i]], [information[i]])
                spans.append(open_span)
        return spans

    def _entity(self, span: Span, text: str) -> dict[str, Any]:
        return {
            "entity": span.kind,
            "text": text[span.start : span.end],
            "start": span.start,
            "end": span.end,
            "probability": sum(span.probabilities) / len(span.probabilities),
            "mutual_information": sum(span.information) / len(span.information),
        }


def split_tag(label: str) -> tuple[str, str]:
    """`B-PER` -> (B, PER); a label without a prefix is its own kind and goes on."""
    prefix, dash, kind = label.partition("-")
    return (prefix, kind) if dash and prefix in ("B", "I") else ("", label)
