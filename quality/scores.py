"""Turns the outputs of members on labelled inputs into scores of quality, calibration and disagreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from vmap_ensemble.core.aggregate import ClassPrediction, combine_classes

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Score:
    """How good and how honest one classifier is on the test images.

    Attributes:
        name: of the member, or "ensemble".
        accuracy: share it gets right, 0 to 1.
        nll: mean negative log-likelihood of the right label, in nats.
        ece: expected calibration error in 15 bins, 0 to 1.
        brier: mean over images of the squared distance between probabilities and the right label, 0 to 2.
    """

    name: str
    accuracy: float
    nll: float
    ece: float
    brier: float


@dataclass(frozen=True)
class Disagreement:
    """What the members' disagreement says about the ensemble's answers.

    Attributes:
        mutual_information: mean over the test images, in nats.
        mutual_information_right: the same over images that the ensemble gets right.
        mutual_information_wrong: the same over those it gets wrong; None where there are none.
        agreement: mean share of members whose label is the ensemble's, 0 to 1.
    """

    mutual_information: float
    mutual_information_right: float | None
    mutual_information_wrong: float | None
    agreement: float


def score(name: str, log_probabilities: Tensor, labels: Tensor) -> Score:
    """Judge one classifier.

    Args:
        name: what to call it in the table.
        log_probabilities: (N, C) float.
        labels: (N,) int64.

    Source: Guo et al., On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599 (ECE)
    """
    classes = log_probabilities.shape[1]
    probabilities = log_probabilities.exp()
    distance = (probabilities - F.one_hot(labels, classes)).square().sum(1)
    return Score(
        name=name,
        accuracy=multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        nll=F.nll_loss(log_probabilities, labels).item(),
        ece=multiclass_calibration_error(probabilities, labels, classes, n_bins=CALIBRATION_BINS).item(),
        brier=distance.mean().item(),
    )


def combine(log_probabilities: Tensor) -> ClassPrediction:
    """Combine the members as the handler does: (M, N, C) log-probabilities, equal weights."""
    return combine_classes(log_probabilities, torch.ones(log_probabilities.shape[:2]))


def measure_disagreement(combined: ClassPrediction, labels: Tensor) -> Disagreement:
    """Relate the members' disagreement to the ensemble's errors.

    Args:
        combined: Of N images.
        labels: (N,) int64.

    Source: Lakshminarayanan et al., Deep Ensembles, https://arxiv.org/abs/1612.01474
    """
    information, right = combined.mutual_information, combined.ranking[:, 0] == labels
    return Disagreement(
        mutual_information=information.mean().item(),
        mutual_information_right=information[right].mean().item() if right.any() else None,
        mutual_information_wrong=information[~right].mean().item() if (~right).any() else None,
        agreement=combined.agreement.mean().item(),
    )


def describe_disagreement(found: Disagreement) -> str:
    """One line on how the members' disagreement tells right answers from wrong ones."""
    parts = [f"mutual information {found.mutual_information:.4f} nats on average"]
    if found.mutual_information_right is not None:
        parts.append(f"{found.mutual_information_right:.4f} where the ensemble is right")
    if found.mutual_information_wrong is not None:
        parts.append(f"{found.mutual_information_wrong:.4f} where it is wrong")
    return ", ".join(parts) + f"; members agree with the ensemble on {found.agreement:.2%}"


def measure_auroc(known: Tensor, unlike: Tensor) -> float:
    """Area under the ROC curve: the chance that an unlike input's score is above a known one's, ties counted half.

    Args:
        known: (N,) scores of known inputs.
        unlike: (K,) of the others.

    Source: Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 143 (1982)
    """
    ordered = known.sort().values
    below, up_to = (torch.searchsorted(ordered, unlike, right=right) for right in (False, True))
    return ((below + up_to).double().mean() / 2 / len(known)).item()
