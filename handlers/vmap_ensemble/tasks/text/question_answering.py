"""Turns questions with contexts into spans of the context, from the members' start and end scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.errors import ItemError, UnreadableItem
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.text.inputs import TextInput, read_question_item
from vmap_ensemble.tasks.text.mode import (
    Target,
    TextExample,
    TextMode,
    Window,
    as_number,
    rows_of,
    unknown_target,
    window_of,
)


@dataclass(frozen=True)
class Candidate:
    """A span of one window: characters of the context, score, the row it was found in, first and last token."""

    start: int
    end: int
    score: float
    row: int
    tokens: tuple[int, int] = (0, 0)


class QuestionAnswering(TextMode):
    """The best span inside the context by the mean of the members' start and end probabilities.

    Probabilities are over the context's tokens and the first token, which stands for "no answer". A context
    longer than max_length is read in windows that share doc_stride tokens.
    """

    fields = ("question", "context")

    def read(self, item: Any) -> TextInput:
        """A question with its context."""
        return read_question_item(item, self.settings.max_characters)

    def encode(self, item: Any) -> TextExample:
        """Tokenise; a long context becomes several windows."""
        text = self.read(item)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        question = len(self.tokenizer(text.text, add_special_tokens=False)["input_ids"])
        if question > room // 2:
            raise UnreadableItem(f"question: {question} tokens; at most {room // 2} leave room for the context")
        stride = min(self.settings.doc_stride, (room - question) // 2)
        encoded = self.tokenizer(
            text.text,
            text.pair,
            truncation="only_second",
            max_length=self.max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        return TextExample(text, [window_of(encoded, i) for i in range(len(encoded["input_ids"]))])

    def sample_items(self, count: int) -> list[Any]:
        """Questions with contexts of different lengths."""
        return [{"question": "what is it?", "context": " ".join(["a sample"] * (i % 4 + 1))} for i in range(count)]

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its start and end logits, each (M, R, S) with R windows."""
        owners = rows_of(examples)
        windows = [window for example in examples for window in example.windows]
        sides = self._combine(outputs, weights[:, owners], windows)
        return [
            self._answer(sides, windows, [r for r, owner in enumerate(owners) if owner == b], weights[:, b], o, e)
            for b, (o, e) in enumerate(zip(options, examples, strict=True))
        ]

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """Start and end of the answer; of other spans of `top_k` by their place in it, or of `no_answer`."""
        windows = example.windows
        rows = list(range(len(windows)))
        start, end = self._combine(outputs, weights.expand(-1, len(windows)), windows)
        nulls = [(start.probabilities[r, 0] * end.probabilities[r, 0]).item() for r in rows]
        null = Candidate(0, 0, min(nulls), nulls.index(min(nulls)))
        top_k = options.top_k or self.settings.top_k
        found = self._best(start.probabilities, end.probabilities, windows, rows, top_k)
        if options.target is None:
            picked = [found[0] if found and found[0].score >= null.score else null]
        else:
            picked = [self._picked(name, found, null) for name in options.target]
        return [target for span in picked for target in self._targets(span, windows, example)]

    def _picked(self, name: str | int, found: list[Candidate], null: Candidate) -> Candidate:
        if name == "no_answer":
            return null
        number = as_number(name, len(found))
        if number is None:
            raise unknown_target(name, f"'no_answer' or a place in 'top_k', 0 to {len(found) - 1}")
        return found[number]

    def _targets(self, span: Candidate, windows: list[Window], example: TextExample) -> list[Target]:
        """The probabilities that the answer begins at its first token and ends at its last one."""
        about = {k: v for k, v in self._span(span, example).items() if k != "score"}

        def score(output: Any, key: str, token: int) -> Tensor:
            logits = output[key].float()
            allowed = _allowed(windows[span.row : span.row + 1], logits.shape[-1]).to(logits.device)
            return self.summand(torch.where(allowed, logits, -torch.inf))[:, token]

        return [
            Target({"position": side, **about}, partial(score, key=f"{side}_logits", token=token), span.row)
            for side, token in zip(("start", "end"), span.tokens, strict=True)
        ]

    def _combine(self, outputs: Any, weights: Tensor, windows: Sequence[Window]) -> list[ClassPrediction]:
        """Start and end of each of R windows, from logits (M, R, S) and weights (M, R)."""
        allowed = _allowed(windows, outputs["start_logits"].shape[-1]).to(outputs["start_logits"].device)
        return [
            combine_classes(
                torch.where(allowed, outputs[key].float(), -torch.inf),
                weights,
                self.settings.aggregation,
                self.settings.temperature,
            )
            for key in ("start_logits", "end_logits")
        ]

    def _answer(
        self,
        sides: list[ClassPrediction],
        windows: list[Window],
        rows: list[int],
        weights: Tensor,
        options: Options,
        example: TextExample,
    ) -> Answer | ItemError:
        start, end = sides
        finite = start.finite[:, rows].all(1) & end.finite[:, rows].all(1)
        ensemble, left_out = self.ensemble_body(options, weights > 0, finite)
        if not ensemble["used"]:
            return self.unusable()
        top_k = options.top_k or self.settings.top_k
        found = self._best(start.probabilities, end.probabilities, windows, rows, top_k)
        null = min((start.probabilities[r, 0] * end.probabilities[r, 0]).item() for r in rows)
        spans = [self._span(candidate, example) for candidate in found]
        row = found[0].row if found else rows[0]
        information = ((start.mutual_information[row] + end.mutual_information[row]) / 2).item()
        agreement = ((start.agreement[row] + end.agreement[row]) / 2).item()
        answerable = bool(spans) and spans[0]["score"] >= null
        nothing = {"answer": "", "start": 0, "end": 0, "score": null}
        body: dict[str, Any] = {
            "prediction": spans[0] if answerable else nothing,
            "top_k": spans,
            "no_answer": {"score": null, "chosen": not answerable},
            "uncertainty": {"mutual_information": information, "agreement": agreement},
            "ensemble": ensemble,
        }
        if options.detail:
            body["members"] = []
            for m, name in enumerate(self.names):
                if weights[m] > 0 and finite[m]:
                    own = start.member_probabilities[m], end.member_probabilities[m]
                    best = self._best(*own, windows, rows, 1)
                    body["members"].append({"name": name, **(self._span(best[0], example) if best else nothing)})
        return Answer(body, information, left_out)

    def _best(
        self, start: Tensor, end: Tensor, windows: list[Window], rows: list[int], top_k: int
    ) -> list[Candidate]:
        """The best spans inside the context over all windows, each stretch of characters once."""
        found: dict[tuple[int, int], Candidate] = {}
        for row in rows:
            window = windows[row]
            inside = torch.tensor([s == 1 for s in window.sequence_ids], device=start.device)
            length = len(window)
            scores = start[row, :length, None] * end[row, None, :length]
            # end not before start, and not more than max_answer_tokens long
            scores = scores.triu().tril(self.settings.max_answer_tokens - 1) * (inside[:, None] & inside[None, :])
            best = scores.flatten().topk(min(4 * top_k, scores.numel()))
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if score <= 0:
                    continue
                characters = (window.offsets[index // length][0], window.offsets[index % length][1])
                candidate = Candidate(*characters, score, row, (index // length, index % length))
                if characters not in found or found[characters].score < score:
                    found[characters] = candidate
        return sorted(found.values(), key=lambda candidate: -candidate.score)[:top_k]

    def _span(self, candidate: Candidate, example: TextExample) -> dict[str, Any]:
        context = example.text.pair or ""
        return {
            "answer": context[candidate.start : candidate.end],
            "start": candidate.start,
            "end": candidate.end,
            "score": candidate.score,
        }


def _allowed(windows: Sequence[Window], length: int) -> Tensor:
    """(R, S) bool: tokens of the context, and the first token, which stands for "no answer"."""
    rows = [
        [i == 0 or s == 1 for i, s in enumerate(window.sequence_ids)] + [False] * (length - len(window))
        for window in windows
    ]
    return torch.tensor(rows)
