"""Turns texts or pairs into one label, several labels or numbers, with the members' disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import combine_classes, entropy, mix, share_weights
from vmap_ensemble.errors import ItemError, SettingsError
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.classification import ClassAnswers, abstaining
from vmap_ensemble.tasks.text.inputs import TextInput, read_text_item
from vmap_ensemble.tasks.text.mode import Target, TextExample, TextMode
from vmap_ensemble.tasks.text.settings import TextSettings


class SingleLabel(TextMode):
    """Exactly one label per text: the answer of every classifier."""

    combines_classes = True

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.class_answers = ClassAnswers(self.settings, self.names, self.labels)

    def read(self, item: Any) -> TextInput:
        """A text, or a pair of texts."""
        return read_text_item(item, self.settings.max_characters)

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its logits (M, B, C)."""
        return self.class_answers(outputs["logits"], weights, options)

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """They sum to 1."""
        settings = self.settings
        return combine_classes(outputs["logits"], weights, settings.aggregation, settings.temperature).probabilities

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """The classes that are asked for; the predicted one by default."""
        logits = outputs["logits"]
        picked = self.picked_labels(options.target, logits.shape[-1], self.predicted(logits, weights))

        def score(output: Any, index: int) -> Tensor:
            return self.summand(output["logits"])[:, index]

        return [Target(self._about(index), partial(score, index=index)) for index in picked]

    def predicted(self, logits: Tensor, weights: Tensor) -> list[int]:
        """The classes of the answer to one text, from logits (M, 1, C)."""
        settings = self.settings
        prediction = combine_classes(logits, weights, settings.aggregation, settings.temperature)
        return [int(prediction.ranking[0, 0])]

    def _about(self, index: int) -> dict[str, Any]:
        return {"label": self.labels.get(index, str(index)), "index": index}


class MultiLabel(SingleLabel):
    """Any number of labels per text, each yes or no on its own."""

    combines_classes = False

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """Of each label on its own."""
        finite = outputs["logits"].isfinite().all(-1)
        own = torch.where(finite[..., None], self.summand(outputs["logits"]), 0.0)
        return mix(share_weights(weights, finite), own)

    @property
    def explains(self) -> str:
        """The mean of the sigmoids, whatever the aggregation."""
        return "probability"

    def predicted(self, logits: Tensor, weights: Tensor) -> list[int]:
        """The labels above the threshold; the most probable one where none is."""
        own = self.summand(logits)[:, 0]
        finite = own.isfinite().all(-1)
        share = share_weights(weights, finite[:, None])
        mixture = mix(share, torch.where(finite[:, None], own, 0.0)[:, None])[0]
        return self._chosen(mixture) or [int(mixture.argmax())]

    def summand(self, logits: Tensor) -> Tensor:
        """The sigmoids."""
        return (logits.float() / self.settings.temperature).sigmoid()

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its logits (M, B, L): the mean of the members' sigmoids per label."""
        logits = outputs["logits"].float() / self.settings.temperature
        finite, asked = logits.isfinite().all(-1), weights > 0
        own = torch.where(finite[..., None], logits, 0.0).sigmoid()
        share = share_weights(weights, finite)
        mixture = mix(share, own)
        total = _binary_entropy(mixture).sum(-1)
        expected = torch.einsum("mb,mbl->b", share, _binary_entropy(own))
        votes = (own >= self.settings.label_threshold) == (mixture >= self.settings.label_threshold)
        agreement = torch.einsum("mb,mb->b", share, votes.float().mean(-1)).clamp_max(1)
        columns = (total, expected, (total - expected).clamp_min(0), agreement)
        uncertainty = torch.stack(columns, dim=-1).tolist()
        return [
            self._answer(mixture[b], own[:, b], uncertainty[b], asked[:, b], finite[:, b], option)
            for b, option in enumerate(options)
        ]

    def _answer(
        self, mixture: Tensor, own: Tensor, four: list[float], asked: Tensor, finite: Tensor, options: Options
    ) -> Answer | ItemError:
        ensemble, left_out = self.ensemble_body(options, asked, finite)
        if not ensemble["used"]:
            return self.unusable()
        top = mixture.argsort(descending=True, stable=True)[: options.top_k or self.settings.top_k].tolist()
        rows = [self._row(index, mixture) for index in top]
        names = ("predictive_entropy", "expected_entropy", "mutual_information", "agreement")
        body: dict[str, Any] = {
            "labels": [row for row in rows if row["probability"] >= self.settings.label_threshold],
            "top_k": rows,
            "uncertainty": dict(zip(names, four, strict=True)),
            "ensemble": ensemble,
            **abstaining(self.settings, self._surety(mixture), four[2]),
        }
        if options.detail:
            body["members"] = [
                {"name": name, "labels": [self._row(i, own[m]) for i in self._chosen(own[m])]}
                for m, name in enumerate(self.names)
                if asked[m] and finite[m]
            ]
        return Answer(body, four[2], left_out)

    def _surety(self, mixture: Tensor) -> float:
        """The probability of the least sure yes or no."""
        return torch.where(mixture >= self.settings.label_threshold, mixture, 1 - mixture).min().item()

    def _row(self, index: int, probabilities: Tensor) -> dict[str, Any]:
        label = self.labels.get(index, str(index))
        return {"label": label, "index": index, "probability": probabilities[index].item()}

    def _chosen(self, probabilities: Tensor) -> list[int]:
        chosen: list[int] = (probabilities >= self.settings.label_threshold).nonzero().flatten().tolist()
        return chosen


class Regression(SingleLabel):
    """Numbers: their mean over the members and its standard deviation."""

    combines_classes = False

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """None: numbers have no probabilities."""
        return TextMode.probabilities(self, outputs, weights)

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        if self.settings.abstains:  # the members' config may say that it is a regression, which settings don't know
            raise SettingsError(
                f"setup_config.json: {self.settings.abstains[0]}: regression has no probabilities to abstain by; "
                "leave it out"
            )

    @property
    def explains(self) -> str:
        """The numbers themselves."""
        return "value"

    def predicted(self, logits: Tensor, weights: Tensor) -> list[int]:
        """All of them."""
        return list(range(logits.shape[-1]))

    def summand(self, logits: Tensor) -> Tensor:
        """The numbers themselves."""
        return logits.float()

    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch from its outputs (M, B, L)."""
        values = outputs["logits"].double()  # the square of a large float32 is infinite
        finite, asked = values.isfinite().all(-1), weights > 0
        share = share_weights(weights, finite)
        share, values = share.double(), torch.where(finite[..., None], values, 0.0)
        mean = torch.einsum("mb,mbl->bl", share, values)
        variance = torch.einsum("mb,mbl->bl", share, (values - mean).square())
        return self.answer_each(
            options,
            asked,
            finite,
            lambda b: {
                "prediction": {"values": mean[b].tolist()},
                "uncertainty": {"standard_deviation": variance[b].sqrt().tolist()},
            },
            lambda m, b: {"values": values[m, b].tolist()},
        )


def _binary_entropy(probabilities: Tensor) -> Tensor:
    return entropy(torch.stack((probabilities, 1 - probabilities), dim=-1))


def kind_of_classification(settings: TextSettings, config: Any) -> type[SingleLabel]:
    """The class that answers a sequence classification: by the settings' or the config's problem type.

    Raises:
        SettingsError: One label alone, of which the softmax is always 1.
    """
    kinds: dict[str, type[SingleLabel]] = {
        "single_label": SingleLabel,
        "multi_label": MultiLabel,
        "regression": Regression,
    }
    theirs = {"multi_label_classification": "multi_label", "regression": "regression"}
    kind = settings.problem_type or theirs.get(config.problem_type or "")
    if kind == "single_label" and config.num_labels == 1:
        raise SettingsError(
            "setup_config.json: problem_type: the members have one label, which a single_label is always sure of; "
            "expected 'regression' (its number) or 'multi_label' (its probability)"
        )
    return kinds[kind or ("regression" if config.num_labels == 1 else "single_label")]
