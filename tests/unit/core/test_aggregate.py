"""Aggregation and uncertainty against torch.distributions and formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical

from vmap_ensemble.core.aggregate import combine_classes, entropy, kind_of_outputs, mix, rank, summands
from vmap_ensemble.errors import LoadError


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


WEIGHTS = {
    **{f"{members} equal": [1.0] * members for members in (1, 3, 7, 10, 11, 14, 25, 49)},
    "2:4:1": [2.0, 4.0, 1.0],
    "many": [float(n) for n in range(1, 30)],
}


@pytest.mark.parametrize("method", ["mean_probability", "mean_logit", "majority_vote"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_numbers_of_sure_members_stay_in_their_range(name, method):
    given = torch.tensor(WEIGHTS[name])[:, None].expand(-1, 3)
    logits = torch.zeros(len(given), 3, 4)
    logits[:, 0, 1], logits[:, 1, 2], logits[:, 2, 0] = 200.0, 20.0, 9.0
    p = combine_classes(logits, given, method)
    assert ((p.probabilities >= 0) & (p.probabilities <= 1)).all()
    assert ((p.mixture >= 0) & (p.mixture <= 1)).all()
    for entropies in (p.predictive_entropy, p.expected_entropy, p.mutual_information):
        assert ((entropies >= 0) & entropies.isfinite()).all()
    assert (p.agreement <= 1).all()
    torch.testing.assert_close(p.agreement, torch.ones(3))
    assert p.predictive_entropy[0] < 1e-6


def test_shares_that_round_beyond_one_are_mixed_within_it():
    share = torch.full((10, 1), 0.1) + 1e-7
    assert share.sum() > 1
    assert mix(share, torch.ones(10, 1, 2)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("members", range(4, 40, 2))
def test_equal_votes_go_to_the_larger_mean_whatever_the_sums_round_to(members):
    # Half of the members, in turn, vote for either class; those for class 2 are surer.
    logits = torch.zeros(members, 1, 3)
    logits[::2, 0, 0], logits[1::2, 0, 2] = 1.0, 3.0
    weights = (torch.arange(members) // 2 + 1).float()[:, None] / 7
    assert combine_classes(logits, weights, "majority_vote").ranking[0, 0] == 2


def test_rank_parts_no_equal_scores():
    scores, decider = torch.tensor([[0.1, 0.25, 0.25 + 3e-8, 0.4]]), torch.tensor([[0.9, 0.3, 0.2, 0.1]])
    assert rank(scores, decider).tolist() == [[3, 1, 2, 0]]
    assert rank(scores, decider, 0.0).tolist() == [[3, 2, 1, 0]]


def test_one_logit_is_the_sigmoid_of_two_classes():
    logits = torch.tensor([[[2.0]], [[-1.0]]])
    p = combine_classes(logits, torch.ones(2, 1), temperature=2.0)
    own = (logits[..., 0] / 2).sigmoid()
    expected = torch.distributions.Bernoulli(probs=own.mean(0))
    torch.testing.assert_close(p.probabilities[0, 1], own.mean())
    assert p.probabilities.shape == (1, 2)
    torch.testing.assert_close(p.predictive_entropy, expected.entropy())
    information = expected.entropy() - torch.distributions.Bernoulli(probs=own).entropy().mean(0)
    torch.testing.assert_close(p.mutual_information, information)
    assert p.member_votes.tolist() == [[1], [0]]


@pytest.mark.parametrize("classes", [1, 2, 6])
@pytest.mark.parametrize("method", ["mean_probability", "mean_logit", "majority_vote"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_kind_of_output_gives_what_its_logits_give(classes, method, temperature):
    logits, weights = noise(3, classes=classes), torch.ones(3, 4)
    of_one = {"probabilities": logits.sigmoid(), "log_probabilities": torch.nn.functional.logsigmoid(logits)}
    of_many = {"probabilities": logits.softmax(-1), "log_probabilities": logits.log_softmax(-1)}
    expected = combine_classes(logits, weights, method, temperature)
    for kind, outputs in (of_one if classes == 1 else of_many).items():
        p = combine_classes(outputs, weights, method, temperature, kind)
        torch.testing.assert_close(p.probabilities, expected.probabilities, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            summands(outputs, method, temperature, kind),
            summands(logits, method, temperature),
            atol=1e-5,
            rtol=1e-3,
        )


def test_a_probability_that_is_not_finite_leaves_its_member_out():
    p = combine_classes(torch.tensor([[[0.5, math.nan]], [[0.25, 0.75]]]), torch.ones(2, 1), kind="probabilities")
    assert p.finite.tolist() == [[False], [True]]
    torch.testing.assert_close(p.probabilities, torch.tensor([[0.25, 0.75]]))


def test_members_that_agree_on_no_class_are_mixed():
    outputs = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    p = combine_classes(outputs, torch.ones(2, 1), "mean_logit", kind="probabilities")
    assert p.probabilities.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kinds_of_outputs_are_told_apart(dtype):
    logits = noise(3, classes=1000)
    assert kind_of_outputs(logits.to(dtype)) == "logits"
    assert kind_of_outputs(logits.softmax(-1).to(dtype)) == "probabilities"
    assert kind_of_outputs(logits.log_softmax(-1).to(dtype)) == "log_probabilities"
    assert kind_of_outputs(logits.sigmoid().to(dtype)) == "logits"


def test_one_row_that_does_not_sum_to_one_tells_logits():
    outputs = noise(2).softmax(-1)
    outputs[1, 3] *= 1.5
    assert kind_of_outputs(outputs) == "logits"
    outputs[1, 3] = math.nan
    assert kind_of_outputs(outputs) == "probabilities"
    assert kind_of_outputs(torch.full((2, 2, 3), math.nan)) == "logits"


def test_one_column_within_zero_and_one_is_refused():
    assert kind_of_outputs(torch.tensor([[[0.5], [-0.1]]])) == "logits"
    with pytest.raises(LoadError, match="set 'output' to 'logits' or 'probabilities'"):
        kind_of_outputs(torch.tensor([[[0.5], [0.1]]]))
