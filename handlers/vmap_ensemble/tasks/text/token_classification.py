"""Turns texts into entities with character offsets, from the members' labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.errors import ItemError
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.text.inputs import TextInput, read_text_item
from vmap_ensemble.tasks.text.mode import Target, TextExample, TextMode, Window, as_number, unknown_target

OUTSIDE = ("O", "")


@dataclass
class Span:
    """An entity while its tokens are gathered."""

    kind: str
    start: int
    end: int
    probabilities: list[float]
    information: list[float]
    # (token, label) of each word's first token
    places: list[tuple[int, int]] = field(default_factory=list)


class TokenClassification(TextMode):
    """Labels of words, joined to entities by BIO (or plain) tags; a word has the label of its first token."""

    def read(self, item: Any) -> TextInput:
        """A text."""
        text = read_text_item(item, self.settings.max_characters)
        return TextInput(text.text)

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its logits (M, B, S, C)."""
        flat, length = self._combine(outputs["logits"], weights)
        return [self._answer(flat, b, length, weights[:, b], option, examples[b]) for b, option in enumerate(options)]

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """The entities of the answer, or those of the kinds or places in `entities` that are asked for."""
        (window,) = example.windows
        flat, _ = self._combine(outputs["logits"], weights)
        spans = self._spans(flat, slice(0, len(window)), window)
        picked = range(len(spans)) if options.target is None else self._picked(spans, options.target)
        return [self._target(spans[i], example.text.text) for i in picked]

    def _picked(self, spans: list[Span], wanted: Sequence[str | int]) -> list[int]:
        kinds = {split_tag(label)[1] for label in self.labels.values()} - set(OUTSIDE)
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

    def _target(self, span: Span, text: str) -> Target:
        tokens, labels = (list(axis) for axis in zip(*span.places, strict=True))
        about = {"entity": span.kind, "text": text[span.start : span.end], "start": span.start, "end": span.end}
        return Target(
            about, lambda output: self.summand(output["logits"][:, tokens])[:, range(len(labels)), labels].mean(1)
        )

    def _combine(self, logits: Tensor, weights: Tensor) -> tuple[ClassPrediction, int]:
        """Each token's prediction, (B * S, ...), and S."""
        members, batch, length, classes = logits.shape
        flat = combine_classes(
            logits.reshape(members, batch * length, classes),
            weights.repeat_interleave(length, dim=1),
            self.settings.aggregation,
            self.settings.temperature,
        )
        return flat, length

    def _spans(self, flat: ClassPrediction, rows: slice, window: Window) -> list[Span]:
        labels = flat.ranking[rows, 0]
        probabilities = flat.probabilities[rows].gather(-1, labels[:, None])[:, 0].tolist()
        return self.join(window, labels.tolist(), probabilities, flat.mutual_information[rows].tolist())

    def _answer(
        self, flat: ClassPrediction, b: int, length: int, weights: Tensor, options: Options, example: TextExample
    ) -> Answer | ItemError:
        (window,) = example.windows
        rows = slice(b * length, b * length + len(window))
        finite = flat.finite[:, rows].all(1)
        ensemble, left_out = self.ensemble_body(options, weights > 0, finite)
        if not ensemble["used"]:
            return self.unusable()
        spans = self._spans(flat, rows, window)
        information = flat.mutual_information[rows].tolist()
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
                open_span.places.append((i, labels[i]))
            else:
                open_span = Span(kind, start, end, [probabilities[i]], [information[i]], [(i, labels[i])])
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
