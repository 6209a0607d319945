"""Aggregation and uncertainty against torch.distributions and formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical

from vmap_ensemble.core.aggregate import combine_classes, entropy


def noise(members, batch=4, classes=6, seed=0):
    return torch.randn(members, batch, classes, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("members", [1, 2, 5])
def test_mean_probability_and_uncertainty(members):
    logits = noise(members)
    p = combine_classes(logits, torch.ones(members, 4))
    own = Categorical(logits=logits)
    mixture = Categorical(probs=own.probs.mean(0))
    torch.testing.assert_close(p.probabilities, mixture.probs)
    torch.testing.assert_close(p.predictive_entropy, mixture.entropy())
    torch.testing.assert_close(p.expected_entropy, own.entropy().mean(0))
    torch.testing.assert_close(p.mutual_information, mixture.entropy() - own.entropy().mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(p.agreement, (own.probs.argmax(-1) == mixture.probs.argmax(-1)).float().mean(0))
    assert torch.equal(p.ranking, mixture.probs.argsort(descending=True))


@pytest.mark.parametrize("members", [1, 2, 5])
def test_log_softmax_is_not_softmaxed_twice(members):
    logits, weights = noise(members), torch.ones(members, 4)
    torch.testing.assert_close(
        combine_classes(logits.log_softmax(-1), weights).probabilities,
        combine_classes(logits, weights).probabilities,
    )


@pytest.mark.parametrize("members", [1, 2, 5])
def test_mean_logit_is_the_geometric_mean(members):
    logits = noise(members)
    expected = logits.softmax(-1).prod(0) ** (1 / members)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(combine_classes(logits, torch.ones(members, 4), "mean_logit").probabilities, expected)


def test_weights_and_temperature():
    logits, weights = noise(2), torch.tensor([[1.0] * 4, [3.0] * 4])
    expected = 0.25 * (logits[0] / 2).softmax(-1) + 0.75 * (logits[1] / 2).softmax(-1)
    torch.testing.assert_close(combine_classes(logits, weights, temperature=2.0).probabilities, expected)


def test_votes_and_their_ties():
    strong, weak = math.log(8), math.log(2)
    logits = torch.tensor([[[strong, 0.0, 0.0]], [[0.0, weak, 0.0]]])
    p = combine_classes(logits, torch.ones(2, 1), "majority_vote")
    assert p.probabilities.tolist() == [[0.5, 0.5, 0.0]]
    assert p.ranking.tolist() == [[0, 1, 2]]
    flipped = combine_classes(logits.flip(-1), torch.ones(2, 1), "majority_vote")
    assert flipped.ranking[0, 0] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["mean_probability", "mean_logit", "majority_vote"])
def test_member_that_is_not_finite_is_left_out_of_its_example_only(bad, method):
    logits = noise(3)
    logits[1, 2, 0] = bad
    p = combine_classes(logits, torch.ones(3, 4), method)
    others = combine_classes(logits[[0, 2]], torch.ones(2, 4), method)
    torch.testing.assert_close(p.probabilities[2], others.probabilities[2])
    assert p.finite.logical_not().nonzero().tolist() == [[1, 2]]
    clean = combine_classes(noise(3), torch.ones(3, 4), method)
    torch.testing.assert_close(p.probabilities[:2], clean.probabilities[:2])


@pytest.mark.parametrize("method", ["mean_probability", "mean_logit", "majority_vote"])
def test_ranked_probabilities_and_members_own_choices(method):
    logits = noise(3)
    p = combine_classes(logits, torch.ones(3, 4), method)
    assert torch.equal(p.ranked_probabilities, p.probabilities.gather(-1, p.ranking))
    assert p.ranked_probabilities.diff(dim=-1).max() <= 1e-7  # equal votes are ranked by the mixture
    assert torch.equal(p.member_votes, logits.argmax(-1))
    torch.testing.assert_close(p.member_top_probabilities, logits.softmax(-1).amax(-1))


def test_no_member_usable():
    p = combine_classes(torch.full((2, 1, 3), math.nan), torch.ones(2, 1), "mean_logit")
    assert p.probabilities.tolist() == [[0, 0, 0]]
    assert not p.used.any()


def test_minus_infinity_is_a_probability_of_zero():
    p = combine_classes(torch.tensor([[[0.0, -math.inf]]]), torch.ones(1, 1))
    assert p.probabilities.tolist() == [[1.0, 0.0]]
    assert p.finite.all()
    assert p.predictive_entropy.tolist() == [0.0]


def test_entropy_of_uniform():
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(3, 2\)"):
        combine_classes(torch.zeros(2, 3, 4), torch.ones(3, 2))
