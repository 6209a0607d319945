"""Turns the outputs of all members into one JSON answer per example: label, top k, uncertainty."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.core.aggregate import ClassPrediction, OutputKind, combine_classes, kind_of_outputs
from vmap_ensemble.errors import ItemError, LoadError, NoAnswer
from vmap_ensemble.tasks.answers import Answer, Options, significant


class ClassAnswers:
    """Answers for classifiers.

    Args:
        settings: Aggregation, temperature, top k, thresholds, form of the answer.
        names: The members, in the order of the stack.
        labels: Class number -> label; a class without one is called by its number. A model with one logit has two.
        kind: What the model's outputs are, as `kind_for` finds at load.
    """

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        labels: dict[int, str] | None,
        kind: OutputKind = "logits",
    ) -> None:
        self.settings, self.names, self.labels, self.kind = settings, tuple(names), labels or {}, kind

    def label(self, index: int) -> str:
        """The label of a class."""
        return self.labels.get(index, str(index))

    def __call__(self, outputs: Any, weights: Tensor, options: Sequence[Options]) -> list[Answer | ItemError]:
        """Answer a batch.

        Args:
            outputs: Of all members: (M, B, C), or several tensors of which `pick_outputs` knows the right one.
            weights: (M, B), the members' weights per example; 0 where a subset leaves one out.
            options: One per example.
        """
        settings = self.settings
        picked = pick_outputs(outputs, settings.num_classes)
        prediction = combine_classes(picked, weights, settings.aggregation, settings.temperature, self.kind)
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
            body |= abstaining(self.settings, rows.top_probabilities[b][0], rows.mutual_information[b])
            if options.subset is not None:
                body["ensemble"]["subset"] = [self.names[m] for m, wanted in enumerate(asked) if wanted]
            if left_out:
                body["ensemble"]["left_out"] = list(left_out)
        if options.detail:
            body["members"] = [self._member(rows, m, b) for m in used]
        dissenting = tuple(self.names[m] for m in rows.dissenting(b))
        return Answer(significant(body), rows.mutual_information[b], left_out, dissenting)

    def _member(self, rows: _Rows, m: int, b: int) -> dict[str, Any]:
        index = rows.member_top[m][b]
        return {
            "name": self.names[m],
            "label": self.label(index),
            "index": index,
            "probability": rows.member_top_probabilities[m][b],
        }


def pick_outputs(outputs: Any, classes: int | None = None) -> Tensor:
    """The classifier's own outputs, (M, B, C), among the tensors that a forward returns.

    Args:
        outputs: A tensor, where (M, B) is one column; an object or mapping with `logits`; or a tuple, list or mapping
            of tensors, whose first of the right shape it is: auxiliary heads come behind the classifier.
        classes: C, where it is known.

    Raises:
        LoadError: No tensor has the right shape, or nothing says which one is the classifier's.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        outputs = logits
    if isinstance(outputs, Tensor):
        if outputs.dim() == 2:
            return outputs[..., None]
        if outputs.dim() == 3:
            return outputs
        raise LoadError(f"the model returns {describe(outputs)}; expected (batch, classes) of a classifier")
    parts = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    tensors = [part for part in parts if isinstance(part, Tensor)] if isinstance(parts, (tuple, list)) else []
    fitting = [part for part in tensors if part.dim() == 3]
    if classes is not None:
        fitting = [part for part in fitting if part.shape[-1] == classes]
    # Of equal shapes the first; one that stands behind others only where no other fits.
    if fitting and len({part.shape for part in fitting}) == 1 and (fitting[0] is tensors[0] or len(fitting) == 1):
        return fitting[0]
    raise LoadError(
        f"the model returns {describe(outputs)}; expected one tensor (batch, classes), or 'logits' among several: "
        "return the classifier's alone from forward"
    )


def kind_for(settings: Settings, outputs: Any) -> OutputKind:
    """What the outputs on the load's sample are: what the settings say, or else what they look like.

    Raises:
        LoadError: As `pick_outputs` and `kind_of_outputs`.
    """
    picked = pick_outputs(outputs, settings.num_classes)
    return kind_of_outputs(picked) if settings.output == "auto" else settings.output


def describe(outputs: Any) -> str:
    """The shapes of what a forward returns, of one member."""
    if isinstance(outputs, Tensor):
        return f"a tensor (batch{''.join(f', {size}' for size in outputs.shape[2:])})"
    several = outputs if isinstance(outputs, (tuple, list)) else ()
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(several)
    parts = [f"{key}: {describe(part) if isinstance(part, Tensor) else type(part).__name__}" for key, part in named]
    return f"{type(outputs).__name__}({', '.join(parts)})"[:400]


def abstaining(settings: Settings, probability: float, information: float) -> dict[str, Any]:
    """An answer's `abstain`, with reasons where there are any.

    Args:
        settings: The limits.
        probability: Of the answer.
        information: Mutual information of the answer, in nats.
    """
    reasons = []
    least, most = settings.abstain_below_probability, settings.abstain_above_mutual_information
    if least is not None and probability < least:
        reasons.append(f"probability below {least}")
    if most is not None and information > most:
        reasons.append(f"mutual information above {most}")
    return {"abstain": True, "abstain_reasons": reasons} if reasons else {"abstain": False}


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
        """Each member's arg max per example; needed where members disagree, or a client asks for them."""
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

    def dissenting(self, b: int) -> list[int]:
        """Used members whose arg max isn't the answer; where all agree, which is mostly, no member is looked at."""
        if self._agreement[b] >= 1:
            return []
        answer = self.top[b][0]
        return [m for m, used in enumerate(self.used[b]) if used and self.member_top[m][b] != answer]

    def uncertainty(self, b: int) -> dict[str, float]:
        predictive, expected = self._entropies[b]
        return {
            "predictive_entropy": predictive,
            "expected_entropy": expected,
            "mutual_information": self.mutual_information[b],
            "agreement": self._agreement[b],
        }
