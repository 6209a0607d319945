"""benchmarks.uncertainty: what the unlike inputs are, areas against torchmetrics, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

import benchmarks.uncertainty
from benchmarks.runs import uncertainty
from training.runs.mnist import save_state_dict
from training.runs.mnist_data import SAMPLE_DIR, Digits, load_digits
from vmap_ensemble.models.mnist import MnistNet


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def few(count: int) -> Digits:
    test = load_digits(SAMPLE_DIR, "test")
    return Digits(test.images[:count], test.labels[:count])


def test_noise_has_each_digits_own_grey_values_elsewhere() -> None:
    images = few(20).images
    noise = uncertainty.shuffle_pixels(images, generator())
    assert noise.shape == images.shape
    assert torch.equal(noise.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not (noise == images).flatten(1).all(1).any()


def test_patches_are_grey_squares_that_differ() -> None:
    patches = uncertainty.cut_patches(uncertainty.PICTURE, 30, generator())
    assert patches.shape == (30, 28, 28)
    assert patches.dtype == torch.uint8
    assert len(patches.unique(dim=0)) == 30
    assert torch.equal(patches, uncertainty.cut_patches(uncertainty.PICTURE, 30, generator()))


def test_a_digit_is_overlaid_with_one_of_another_label() -> None:
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    labels = torch.arange(40) % 4
    images[torch.arange(40), labels] = 200  # a line of its own for each label
    drawn = uncertainty.overlay_digits(Digits(images, labels), generator())
    assert torch.equal((drawn == 200).any(2).sum(1), torch.full((40,), 2))
    assert (drawn >= images).all()


def test_auroc_is_torchmetrics_and_counts_ties_half() -> None:
    known, unlike = torch.rand(50, generator=generator()), torch.rand(60, generator=generator()) ** 0.5
    known[:10] = unlike[:10]
    scores = torch.cat([known, unlike])
    target = torch.cat([torch.zeros(50), torch.ones(60)]).long()
    expected = binary_auroc(scores, target).item()
    assert uncertainty.measure_auroc(known, unlike) == pytest.approx(expected, abs=1e-6)
    assert uncertainty.measure_auroc(torch.ones(3), torch.ones(2)) == 0.5
    assert uncertainty.measure_auroc(torch.zeros(3), torch.ones(2)) == 1.0


def test_share_found_is_above_the_threshold_that_refuses_so_many() -> None:
    known, unlike = torch.arange(101.0), torch.tensor([10.0, 94.0, 96.0, 200.0])
    found = uncertainty.find_share(known, unlike, torch.tensor([0.0, 0.05, 0.5, 1.0]))
    assert found.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_a_single_member_is_scored_by_its_own_probability() -> None:
    outputs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()[:, None]  # (2, 1, 2)
    scores = uncertainty.score_inputs(outputs)
    assert scores["member_probability"].shape == (2, 1)
    assert scores["member_probability"].exp().reciprocal().flatten().tolist() == pytest.approx([0.9, 0.6])
    assert scores["ensemble_probability"].tolist() == [[pytest.approx(0.25)]]


def test_given_members_are_measured_and_written(tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        save_state_dict(MnistNet(), tmp_path / "members" / f"m{seed}.pt")
    target = tmp_path / "figures.json"
    pictures = ["--save-unlike", str(tmp_path / "unlike")]
    arguments = ["--members", str(tmp_path / "members"), "--images", "60", "--json", str(target), *pictures]
    code = benchmarks.uncertainty.main(arguments)
    figures = json.loads(target.read_text())
    assert code == 0
    assert (figures["table"], figures["members"], figures["trained"]) == ("uncertainty", 2, None)
    assert len(figures["unlike"]) == 3
    assert sorted((kind.name, len(list(kind.glob("*.png")))) for kind in (tmp_path / "unlike").iterdir()) == [
        ("noise", 60),
        ("squares_of_a_picture", 60),
        ("two_digits_over_one_another", 60),
    ]
    for kind in (figures["digits"], *figures["unlike"]):
        assert sum(kind["histogram"]) == kind["count"] == 60
    for kind in figures["unlike"]:
        assert [row["score"] for row in kind["scores"]] == list(uncertainty.score_inputs(torch.zeros(2, 1, 10)))
        assert all(row["curve"] == sorted(row["curve"]) and row["curve"][-1] <= 1 for row in kind["scores"])


def test_one_member_cannot_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.uncertainty.main(["--num-models", "1"])
    assert "expected at least 2, got 1" in capsys.readouterr().err
    assert benchmarks.uncertainty.main(["--members", str(tmp_path / "none")]) == 2
    assert "error: " in capsys.readouterr().err
