"""Turns the outputs of all members into one prediction and what the members disagree about.

    p = sum_m w_m softmax(y_m / T)          combined prediction, and the mixture that uncertainty is about
    H[p]                                    predictive entropy (total)
    sum_m w_m H[p_m]                        expected entropy (aleatoric)
    H[p] - sum_m w_m H[p_m]                 mutual information (epistemic), never below 0
    sum_m w_m [argmax p_m = prediction]     agreement

Weights that should sum to 1 may sum to 1.0000001 in float32: what they mix is brought back into 0..1 here, where it
is computed, since the entropy of 1.0000001 is negative and that of its complement is minus infinity.

Source: Lakshminarayanan et al. 2017 (deep ensembles); Depeweg et al. 2018 (the split of the entropy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vmap_ensemble.errors import LoadError

Method = Literal["mean_probability", "mean_logit", "majority_vote"]
OutputKind = Literal["logits", "probabilities", "log_probabilities"]

# Sums of votes that differ by less are equal: the same weights in another order.
TIE = 1e-6
# How far from 1 the sum of a softmax may be, over a thousand classes, by the outputs' precision.
SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ClassPrediction:
    """What an ensemble of classifiers says of a batch. M members, B examples, C classes; entropies in nats.

    Attributes:
        probabilities: (B, C) float32, the combined prediction; zeros where no member was usable.
        mixture: (B, C) float32, the members' mean probability, which decides between equal votes.
        ranking: (B, C) int64, classes from most to least probable.
        ranked_probabilities: (B, C) float32, `probabilities` in that order.
        member_probabilities: (M, B, C) float32, each member's own; zeros where it was not finite.
        member_votes: (M, B) int64, each member's arg max; 0 where it was not finite.
        member_top_probabilities: (M, B) float32, each member's probability of its own arg max.
        used: (M, B) bool, members with a positive weight and a finite output.
        finite: (M, B) bool, members whose output was finite.
        predictive_entropy: (B,) float32, of the mixture of the used members.
        expected_entropy: (B,) float32.
        mutual_information: (B,) float32.
        agreement: (B,) float32, weighted share of used members whose arg max is the ensemble's.
    """

    probabilities: Tensor
    mixture: Tensor
    ranking: Tensor
    ranked_probabilities: Tensor
    member_probabilities: Tensor
    member_votes: Tensor
    member_top_probabilities: Tensor
    used: Tensor
    finite: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    agreement: Tensor


def combine_classes(
    outputs: Tensor,
    weights: Tensor,
    method: Method = "mean_probability",
    temperature: float = 1.0,
    kind: OutputKind = "logits",
) -> ClassPrediction:
    """Combine classifiers, example by example, each with its own weights of the members.

    Args:
        outputs: (M, B, C). A single column is the second of two classes, as a sigmoid gives it: C is 2 in the answer.
        weights: (M, B) float, not negative; 0 leaves a member out of an example. Need not sum to 1.
        method: `mean_probability`, `mean_logit` (geometric mean of the probabilities, renormalised) or
            `majority_vote` (weighted share of the votes; ties go to the larger mean probability).
        temperature: Logits are divided by it before the softmax.
        kind: What the outputs are.

    Returns:
        The prediction; an example for which no member is usable has zero probabilities and `used` all False.

    Raises:
        ValueError: The shapes don't match.
    """
    parts = combine(outputs, weights, method, temperature, kind)
    combined, mixture, share = parts.probabilities, parts.mixture, parts.share
    if method == "mean_probability":
        ranked, ranking = mixture.sort(dim=-1, descending=True, stable=True)
    else:
        ranking = rank(combined, mixture, TIE if method == "majority_vote" else 0.0)
        ranked = combined.gather(-1, ranking)
    total, expected, information, agreement = disagreement(parts, ranking[:, 0])
    return ClassPrediction(
        probabilities=combined,
        mixture=mixture,
        ranking=ranking,
        ranked_probabilities=ranked,
        member_probabilities=parts.member_probabilities,
        member_votes=parts.votes,
        member_top_probabilities=parts.vote_probabilities,
        used=share > 0,
        finite=parts.finite,
        predictive_entropy=total,
        expected_entropy=expected,
        mutual_information=information,
        agreement=agreement,
    )


@dataclass(frozen=True)
class Combined:
    """What a prediction is made of before anything is ranked; the names are those of `ClassPrediction`.

    Attributes:
        votes: (M, B) int64.
        vote_probabilities: (M, B).
        share: (M, B), the weights of the usable members, summing to 1.
    """

    probabilities: Tensor
    mixture: Tensor
    member_probabilities: Tensor
    votes: Tensor
    vote_probabilities: Tensor
    finite: Tensor
    share: Tensor


def combine(outputs: Tensor, weights: Tensor, method: Method, temperature: float, kind: OutputKind) -> Combined:
    """The part of `combine_classes` that sorts nothing, which exporters can read; its arguments are the same.

    Raises:
        ValueError: The shapes don't match.
    """
    if outputs.dim() != 3 or weights.shape != outputs.shape[:2]:
        raise ValueError(
            f"expected logits (M, B, C) and weights (M, B), got {tuple(outputs.shape)} and {tuple(weights.shape)}"
        )
    # Few operators: on the outputs of small networks each costs more than what it computes.
    own = log_probabilities(outputs, temperature, kind)
    # The log-softmax of a row with NaN, +inf or nothing but -inf is NaN throughout; a single -inf is a legal zero.
    finite = ~own[..., 0].isnan()
    own_probabilities = own.exp().nan_to_num(nan=0.0)
    votes = own_probabilities.max(-1)
    share = share_weights(weights, finite)
    combined = mixture = mix(share, own_probabilities)
    if method == "majority_vote":
        combined = _count_votes(votes.indices, share, mixture)
    elif method == "mean_logit":
        combined = _mean_logit(own, share, mixture)
    return Combined(combined, mixture, own_probabilities, votes.indices, votes.values, finite, share)


def disagreement(parts: Combined, winner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictive and expected entropy, mutual information, and agreement with the winner (B,): each (B,)."""
    total = entropy(parts.mixture)
    expected = (parts.share * entropy(parts.member_probabilities)).sum(0)
    agreement = (parts.share * (parts.votes == winner)).sum(0).clamp_max(1)
    return total, expected, (total - expected).clamp_min(0), agreement


def scale(logits: Tensor, temperature: float) -> Tensor:
    """(..., C) logits in float32, divided by the temperature."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def log_probabilities(outputs: Tensor, temperature: float = 1.0, kind: OutputKind = "logits") -> Tensor:
    """The logarithms of the probabilities that a model's outputs stand for.

    Args:
        outputs: (..., C); a single column is the second of two classes.
        temperature: Logits are divided by it; of probabilities their logarithms are, which is the same.
        kind: What the outputs are. The log-softmax of a log-softmax is itself, and so is that of the logarithm of a
            softmax.

    Returns:
        (..., C) float32, (..., 2) for a single column; NaN in all of a row that is not finite.
    """
    outputs = outputs.float()
    if kind == "probabilities":
        outputs = torch.cat((1 - outputs, outputs), -1).log() if outputs.shape[-1] == 1 else outputs.log()
    elif outputs.shape[-1] == 1:
        first = torch.zeros_like(outputs) if kind == "logits" else torch.log1p(-outputs.exp())
        outputs = torch.cat((first, outputs), -1)
    return scale(outputs, temperature).log_softmax(-1)


def kind_of_outputs(outputs: Tensor) -> OutputKind:
    """What a model's outputs on a sample are: rows that all sum to 1 are a softmax's, and get no other.

    Args:
        outputs: (M, B, C) of all members on the sample batch that the forward is proved on.

    Raises:
        LoadError: There is one column, all of it in 0..1: a logit or a sigmoid, which numbers don't tell.
    """
    rows = outputs.float().flatten(0, -2)
    rows = rows[rows.isfinite().all(-1)]
    if not len(rows):
        return "logits"
    if rows.shape[-1] == 1:
        if ((rows >= 0) & (rows <= 1)).all():
            raise LoadError(
                "the model's one output lies within 0 and 1 on the sample, as a logit or a probability may: set "
                "'output' to 'logits' or 'probabilities' in setup_config.json"
            )
        return "logits"
    tolerance = SUM_TOLERANCE.get(outputs.dtype, 1e-3)
    if (rows >= 0).all() and ((rows.sum(-1) - 1).abs() <= tolerance).all():
        return "probabilities"
    return "log_probabilities" if (rows.logsumexp(-1).abs() <= tolerance).all() else "logits"


def summands(outputs: Tensor, method: Method, temperature: float, kind: OutputKind = "logits") -> Tensor:
    """What each member adds to the weighted sum that a method is made of.

    Args:
        outputs: (..., C).
        method: As for `combine_classes`. The sum is the prediction of mean_probability, its logarithm up to a
            constant of mean_logit; votes have no gradient, so theirs is the mixture that breaks their ties.
        temperature: Logits are divided by it.
        kind: What the outputs are.

    Returns:
        (..., C) float32: probabilities, or their logarithms for mean_logit.
    """
    own = log_probabilities(outputs, temperature, kind)
    return own if method == "mean_logit" else own.exp()


def share_weights(weights: Tensor, finite: Tensor) -> Tensor:
    """Members' shares per example: (M, B) weights where finite, summing to 1; zeros where nobody is usable."""
    share = weights.float() * finite
    return share / share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)


def mix(share: Tensor, values: Tensor) -> Tensor:
    """The members' weighted mean of numbers within 0..1, within 0..1: (M, B) and (M, B, C) -> (B, C)."""
    return (share[..., None] * values).sum(0).clamp(0, 1)


def rank(scores: Tensor, decider: Tensor, tie: float = TIE) -> Tensor:
    """Places from the largest score to the smallest; those that are equal, up to `tie`, by the decider.

    Args:
        scores: (..., C), sums of votes, say.
        decider: (..., C), the mean probabilities.
        tie: Neighbours in the order that differ by no more are equal. Rounding would part some of them.

    Returns:
        (..., C) int64.
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    steps = torch.nn.functional.pad(ranked[..., :-1] - ranked[..., 1:] > tie, (1, 0)).cumsum(-1)
    groups = torch.empty_like(steps).scatter(-1, order, steps)
    by_decider = decider.argsort(dim=-1, descending=True, stable=True)
    return by_decider.gather(-1, groups.gather(-1, by_decider).argsort(dim=-1, stable=True))


def _mean_logit(own: Tensor, share: Tensor, mixture: Tensor) -> Tensor:
    # xlogy-like: a member with weight 0 adds 0 even where its log-probability is -inf or NaN.
    weighted = torch.where(share[..., None] > 0, share[..., None] * own, 0.0).sum(0)
    usable = (share > 0).any(0)[:, None]
    # Members that agree on no class at all have no geometric mean.
    disjoint = weighted.isneginf().all(-1, keepdim=True)
    geometric = torch.where(usable & ~disjoint, weighted, 0.0).softmax(-1)
    return torch.where(disjoint, mixture, geometric) * usable


def _count_votes(votes: Tensor, share: Tensor, mixture: Tensor) -> Tensor:
    """(M, B) classes and their weights -> (B, C) shares of the votes."""
    ballots = torch.nn.functional.one_hot(votes, mixture.shape[-1])
    return torch.einsum("mb,mbc->bc", share, ballots.to(share)).clamp_max(1)


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy along the last axis in nats; 0 log 0 is 0. (..., C) in 0..1 -> (...), never below 0."""
    # Not torch.special.entr, which the ONNX exporter can't take apart; from 0, since -0.0 would be written as it is.
    return 0.0 - torch.xlogy(probabilities, probabilities).sum(-1)
