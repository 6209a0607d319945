"""Turns questions with contexts into spans of the context, from the members' start and end scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import TIE, ClassPrediction, combine_classes, rank
from vmap_ensemble.errors import ItemError, UnreadableItem
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.classification import abstaining
from vmap_ensemble.tasks.text.inputs import TextInput, read_question_item
from vmap_ensemble.tasks.text.mode import (
    Target,
    TextExample,
    TextMode,
    Window,
    as_number,
    rows_of,
    unknown_target,
)
from vmap_ensemble.tasks.text.windows import trim


@dataclass(frozen=True)
class Candidate:
    """A span of one window.

    Attributes:
        start: First character in the context.
        end: The one behind its last.
        score: What the members give it together: the product of its start's and its end's probability.
        mean: The product of the mean probabilities, which decides between equal scores of a majority vote.
        row: The window it was found in.
        tokens: Its first and last token.
    """

    start: int
    end: int
    score: float
    mean: float
    row: int
    tokens: tuple[int, int] = (0, 0)

    def beats(self, other: Candidate, tie: float) -> bool:
        """Whether it is at least as good; scores that differ by no more than `tie` are equal."""
        equal = abs(self.score - other.score) <= tie
        return self.mean >= other.mean if equal else self.score > other.score


@dataclass(frozen=True)
class Sides:
    """Probabilities (R, S) of starts and ends, those that score and those that decide between equal scores."""

    start: Tensor
    end: Tensor
    mean_start: Tensor
    mean_end: Tensor

    def null(self, rows: Sequence[int]) -> Candidate:
        """No answer: the first token of the window that finds it least probable."""
        score = (self.start[rows, 0] * self.end[rows, 0]).tolist()
        mean = (self.mean_start[rows, 0] * self.mean_end[rows, 0]).tolist()
        least = min(range(len(rows)), key=lambda i: (score[i], mean[i]))
        return Candidate(0, 0, score[least], mean[least], rows[least])


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
        return self.encode_windows(text, "only_second", stride)

    def sample_items(self, count: int) -> list[Any]:
        """Questions with contexts of different lengths."""
        return [{"question": "what is it?", "context": " ".join(["a sample"] * (i % 4 + 1))} for i in range(count)]

    def answer_batch(
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
        sides = _both(*self._combine(outputs, weights.expand(-1, len(windows)), windows))
        null = sides.null(rows)
        found = self._best(sides, windows, rows, example, options.top_k or self.settings.top_k)
        if options.target is None:
            picked = [found[0] if found and found[0].beats(null, self.tie) else null]
        else:
            picked = [self._picked(name, found, null) for name in options.target]
        return [target for span in picked for target in self._targets(span, windows, example)]

    @property
    def tie(self) -> float:
        """How far apart equal scores may be: sums of votes are, in another order; other numbers are what they are."""
        return TIE if self.settings.aggregation == "majority_vote" else 0.0

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
        both = _both(start, end)
        found = self._best(both, windows, rows, example, options.top_k or self.settings.top_k)
        null = both.null(rows)
        spans = [self._span(candidate, example) for candidate in found]
        row = found[0].row if found else rows[0]
        information = ((start.mutual_information[row] + end.mutual_information[row]) / 2).item()
        agreement = ((start.agreement[row] + end.agreement[row]) / 2).item()
        answerable = bool(found) and found[0].beats(null, self.tie)
        nothing: dict[str, Any] = {"answer": "", "start": 0, "end": 0, "score": null.score}
        prediction = spans[0] if answerable else nothing
        body: dict[str, Any] = {
            "prediction": prediction,
            "top_k": spans,
            "no_answer": {"score": null.score, "chosen": not answerable},
            "uncertainty": {"mutual_information": information, "agreement": agreement},
            "ensemble": ensemble,
            **abstaining(self.settings, prediction["score"], information),
        }
        if options.detail:
            body["members"] = []
            for m, name in enumerate(self.names):
                if weights[m] > 0 and finite[m]:
                    own = start.member_probabilities[m], end.member_probabilities[m]
                    best = self._best(Sides(*own, *own), windows, rows, example, 1)
                    body["members"].append({"name": name, **(self._span(best[0], example) if best else nothing)})
        return Answer(body, information, left_out)

    def _best(
        self, sides: Sides, windows: list[Window], rows: list[int], example: TextExample, top_k: int
    ) -> list[Candidate]:
        """The best spans inside the context over all windows, each stretch of characters once."""
        context = example.text.pair or ""
        found: dict[tuple[int, int], Candidate] = {}
        for row in rows:
            window = windows[row]
            length = len(window)
            means = sides.mean_start[row, :length, None] * sides.mean_end[row, None, :length]
            for index, score in self._scored(sides, row, window, means, 4 * top_k):
                first, last = divmod(index, length)
                characters = trim(context, window.offsets[first][0], window.offsets[last][1])
                if characters[0] == characters[1]:  # tokens of spaces alone
                    continue
                candidate = Candidate(*characters, score, means[first, last].item(), row, (first, last))
                if characters not in found or not found[characters].beats(candidate, self.tie):
                    found[characters] = candidate
        candidates = list(found.values())
        scores, decisive = (torch.tensor([getattr(c, key) for c in candidates]) for key in ("score", "mean"))
        return [candidates[i] for i in rank(scores, decisive, self.tie).tolist()[:top_k]] if candidates else []

    def _scored(self, sides: Sides, row: int, window: Window, means: Tensor, count: int) -> list[tuple[int, float]]:
        """The best pairs of a first and a last token in one window, (first * S + last, score)."""
        length = len(window)
        inside = torch.tensor([s == 1 for s in window.sequence_ids], device=means.device)
        scores = sides.start[row, :length, None] * sides.end[row, None, :length]
        # end not before start, and not more than max_answer_tokens long
        scores = scores.triu().tril(self.settings.max_answer_tokens - 1) * (inside[:, None] & inside[None, :])
        flat = scores.flatten()
        if self.settings.aggregation == "majority_vote":
            # At most one start and one end a member: few, and equal ones among them, which topk orders as it likes.
            voted = flat.nonzero().flatten()
            places = voted[rank(flat[voted], means.flatten()[voted], self.tie)[:count]]
        else:
            places = flat.topk(min(count, flat.numel())).indices
        rows = zip(places.tolist(), flat[places].tolist(), strict=True)
        return [(index, score) for index, score in rows if score > 0]

    def _span(self, candidate: Candidate, example: TextExample) -> dict[str, Any]:
        context = example.text.pair or ""
        return {
            "answer": context[candidate.start : candidate.end],
            "start": candidate.start,
            "end": candidate.end,
            "score": candidate.score,
        }


def _both(start: ClassPrediction, end: ClassPrediction) -> Sides:
    return Sides(start.probabilities, end.probabilities, start.mixture, end.mixture)


def _allowed(windows: Sequence[Window], length: int) -> Tensor:
    """(R, S) bool: tokens of the context, and the first token, which stands for "no answer"."""
    rows = [
        [i == 0 or s == 1 for i, s in enumerate(window.sequence_ids)] + [False] * (length - len(window))
        for window in windows
    ]
    return torch.tensor(rows)
