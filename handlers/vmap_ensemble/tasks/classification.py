"""Turns the logits of all members into one JSON answer per example: label, top k, uncertainty."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes
from vmap_ensemble.errors import ItemError, NoAnswer
from vmap_ensemble.tasks.answers import Answer, Options


class ClassAnswers:
    """Answers for classifiers.

    Args:
        settings: Aggregation, temperature, top k, thresholds, form of the answer.
        names: The members, in the order of the stack.
        labels: Class number -> label; a class without one is called by its number.
    """

    def __init__(self, settings: Settings, names: Sequence[str], labels: dict[int, str] | None) -> None:
        self.settings, self.names, self.labels = settings, tuple(names), labels or {}

    def label(self, index: int) -> str:
        """The label of a class."""
        return self.labels.get(index, str(index))

    def __call__(self, logits: Tensor, weights: Tensor, options: Sequence[Options]) -> list[Answer | ItemError]:
        """Answer a batch.

        Args:
            logits: (M, B, C) of all members.
            weights: (M, B), the members' weights per example; 0 where a subset leaves one out.
            options: One per example.
        """
        settings = self.settings
        prediction = combine_classes(logits, weights, settings.aggregation, settings.temperature)
        rows = _Rows(prediction, max(o.top_k or settings.top_k for o in options))
        asked = (weights > 0).T.tolist()
        return [self._answer(rows, b, option, asked[b]) for b, option in enumerate(options)]

    def _answer(self, rows: _Rows, b: int, options: Options, asked: list[bool]) -> Answer | ItemError:
        used = [m for m, is_used in enumerate(rows.used[b]) if is_used]
        left_out = tuple(self.names[m] for m, wanted in enumerate(asked) if wanted and not rows.finite[b][m])
        if not used:
            return NoAnswer("no member gave a finite output for this input")
        top = list(zip(rows.top[b], rows.top_probabilities[b], strict=True))[: options.top_k or self.settings.top_k]
        if self.settings.response == "torchserve":
            # Labels may repeat (ImageNet has two cranes): from the last to the first, so that the larger stays.
            body: dict[str, Any] = {self.label(index): probability for index, probability in top[::-1]}
            body = dict(reversed(body.items()))
        else:
            ranked = [{"label": self.label(i), "index": i, "probability": p} for i, p in top]
            body = {
                "prediction": ranked[0],
                "top_k": ranked,
                "uncertainty": rows.uncertainty(b),
                "ensemble": {"size": len(self.names), "used": len(used)},
            }
            reasons = self._reasons_to_abstain(rows, b)
            body["abstain"] = bool(reasons)
            if reasons:
                body["abstain_reasons"] = reasons
            if options.subset is not None:
                body["ensemble"]["subset"] = [self.names[m] for m, wanted in enumerate(asked) if wanted]
            if left_out:
                body["ensemble"]["left_out"] = list(left_out)
        if options.detail:
            body["members"] = [self._member(rows, m, b) for m in used]
        return Answer(body, rows.mutual_information[b], left_out)

    def _member(self, rows: _Rows, m: int, b: int) -> dict[str, Any]:
        index = rows.member_top[m][b]
        return {
            "name": self.names[m],
            "label": self.label(index),
            "index": index,
            "probability": rows.member_top_probabilities[m][b],
        }

    def _reasons_to_abstain(self, rows: _Rows, b: int) -> list[str]:
        settings, reasons = self.settings, []
        least, most = settings.abstain_below_probability, settings.abstain_above_mutual_information
        if least is not None and rows.top_probabilities[b][0] < least:
            reasons.append(f"probability below {least}")
        if most is not None and rows.mutual_information[b] > most:
            reasons.append(f"mutual information above {most}")
        return reasons


class _Rows:
    """A prediction as Python lists, moved from the device once per batch."""

    def __init__(self, prediction: ClassPrediction, top_k: int) -> None:
        # A client's top_k may be larger than an int64.
        top_k = min(top_k, prediction.ranking.shape[-1])
        self.top = prediction.ranking[:, :top_k].tolist()
        self.top_probabilities = prediction.ranked_probabilities[:, :top_k].tolist()
        self.used = prediction.used.T.tolist()
        self.finite = prediction.finite.T.tolist()
        self.mutual_information = prediction.mutual_information.tolist()
        self._prediction = prediction

    @functools.cached_property
    def member_top(self) -> list[list[int]]:
        """Each member's arg max per example; only a client that asks for members needs it."""
        return self._prediction.member_votes.tolist()

    @functools.cached_property
    def member_top_probabilities(self) -> list[list[float]]:
        """Each member's probability of its arg max."""
        return self._prediction.member_top_probabilities.tolist()

    @functools.cached_property
    def _entropies(self) -> list[tuple[float, float]]:
        p = self._prediction
        return list(zip(p.predictive_entropy.tolist(), p.expected_entropy.tolist(), strict=True))

    @functools.cached_property
    def _agreement(self) -> list[float]:
        return self._prediction.agreement.tolist()

    def uncertainty(self, b: int) -> dict[str, float]:
        predictive, expected = self._entropies[b]
        return {
            "predictive_entropy": predictive,
            "expected_entropy": expected,
            "mutual_information": self.mutual_information[b],
            "agreement": self._agreement[b],
        }
