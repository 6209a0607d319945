"""Turns the outputs of all members into one prediction and what the members disagree about.

    p = sum_m w_m softmax(y_m / T)          combined prediction, and the mixture that uncertainty is about
    H[p]                                    predictive entropy (total)
    sum_m w_m H[p_m]                        expected entropy (aleatoric)
    H[p] - sum_m w_m H[p_m]                 mutual information (epistemic), never below 0
    sum_m w_m [argmax p_m = prediction]     agreement

Source: Lakshminarayanan et al. 2017 (deep ensembles); Depeweg et al. 2018 (the split of the entropy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["mean_probability", "mean_logit", "majority_vote"]


@dataclass(frozen=True)
class ClassPrediction:
    """What an ensemble of classifiers says of a batch. M members, B examples, C classes; entropies in nats.

    Attributes:
        probabilities: (B, C) float32, the combined prediction; zeros where no member was usable.
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
    logits: Tensor, weights: Tensor, method: Method = "mean_probability", temperature: float = 1.0
) -> ClassPrediction:
    """Combine classifiers, example by example, each with its own weights of the members.

    Args:
        logits: (M, B, C), unnormalised or log-probabilities (log-softmax outputs give the same numbers, since
            the softmax of a log-softmax is the softmax).
        weights: (M, B) float, not negative; 0 leaves a member out of an example. Need not sum to 1.
        method: `mean_probability`, `mean_logit` (geometric mean of the probabilities, renormalised) or
            `majority_vote` (weighted share of the votes; ties go to the larger mean probability).
        temperature: Logits are divided by it before the softmax.

    Returns:
        The prediction; an example for which no member is usable has zero probabilities and `used` all False.

    Raises:
        ValueError: The shapes don't match.
    """
    if logits.dim() != 3 or weights.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits (M, B, C) and weights (M, B), got {tuple(logits.shape)} and {tuple(weights.shape)}"
        )
    # Few operators: on the outputs of small networks each costs more than what it computes.
    own = scale(logits, temperature).log_softmax(-1)
    # The log-softmax of a row with NaN, +inf or nothing but -inf is NaN throughout; a single -inf is a legal zero.
    finite = ~own[..., 0].isnan()
    own_probabilities = own.exp().nan_to_num(nan=0.0)
    votes = own_probabilities.max(-1)
    share = share_weights(weights, finite)
    mixture = (share[..., None] * own_probabilities).sum(0)
    if method == "mean_probability":
        combined = mixture
        ranked, ranking = mixture.sort(dim=-1, descending=True, stable=True)
    else:
        combined = _mean_logit(own, share) if method == "mean_logit" else _count_votes(votes.indices, share, mixture)
        ranking = _rank(combined, mixture)
        ranked = combined.gather(-1, ranking)
    total = entropy(mixture)
    expected = (share * entropy(own_probabilities)).sum(0)
    return ClassPrediction(
        probabilities=combined,
        ranking=ranking,
        ranked_probabilities=ranked,
        member_probabilities=own_probabilities,
        member_votes=votes.indices,
        member_top_probabilities=votes.values,
        used=share > 0,
        finite=finite,
        predictive_entropy=total,
        expected_entropy=expected,
        mutual_information=(total - expected).clamp_min(0),
        agreement=(share * (votes.indices == ranking[:, 0])).sum(0),
    )


def scale(logits: Tensor, temperature: float) -> Tensor:
    """(..., C) logits in float32, divided by the temperature."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def summands(logits: Tensor, method: Method, temperature: float) -> Tensor:
    """What each member adds to the weighted sum that a method is made of.

    Args:
        logits: (..., C).
        method: As for `combine_classes`. The sum is the prediction of mean_probability, its logarithm up to a
            constant of mean_logit; votes have no gradient, so theirs is the mixture that breaks their ties.
        temperature: Logits are divided by it.

    Returns:
        (..., C) float32: probabilities, or their logarithms for mean_logit.
    """
    scaled = scale(logits, temperature)
    return scaled.log_softmax(-1) if method == "mean_logit" else scaled.softmax(-1)


def share_weights(weights: Tensor, finite: Tensor) -> Tensor:
    """Members' shares per example: (M, B) weights where finite, summing to 1; zeros where nobody is usable."""
    share = weights.float() * finite
    return share / share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)


def _mean_logit(own: Tensor, share: Tensor) -> Tensor:
    # xlogy-like: a member with weight 0 adds 0 even where its log-probability is -inf or NaN.
    weighted = torch.where(share[..., None] > 0, share[..., None] * own, 0.0).sum(0)
    usable = (share > 0).any(0)
    return torch.where(usable[:, None], weighted, 0.0).softmax(-1) * usable[:, None]


def _count_votes(votes: Tensor, share: Tensor, mixture: Tensor) -> Tensor:
    """(M, B) classes and their weights -> (B, C) shares of the votes."""
    ballots = torch.nn.functional.one_hot(votes, mixture.shape[-1])
    return torch.einsum("mb,mbc->bc", share, ballots.to(share))


def _rank(combined: Tensor, mixture: Tensor) -> Tensor:
    """Classes by combined probability; equal ones (rounded, votes are sums) by the mixture."""
    by_mixture = mixture.argsort(dim=-1, descending=True, stable=True)
    coarse = (combined.double() * 1e7).round().gather(-1, by_mixture)
    order = coarse.argsort(dim=-1, descending=True, stable=True)
    return by_mixture.gather(-1, order)


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy along the last axis in nats; 0 log 0 is 0. (..., C) -> (...)."""
    return torch.special.entr(probabilities).sum(-1)
