"""Turns what students and teachers say of a batch into the numbers that training makes small.

H heads (1 for a single student), B batch, C classes; all arguments are log-probabilities.

Source: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; Tran et al.,
Hydra: Preserving Ensemble Diversity for Model Distillation, https://arxiv.org/abs/2001.04694 (a head per member)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from optimise.examples.data import UNLABELLED


def soften(log_probabilities: Tensor, temperature: float) -> Tensor:
    """(..., C) log-probabilities of the softmax at a temperature; of logits they are those up to a constant."""
    return log_probabilities if temperature == 1 else (log_probabilities / temperature).log_softmax(-1)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student), both softened: the mean over heads and examples.

    Args:
        student: (H, B, C).
        teacher: (H, B, C), what each head is to say. No gradient flows into it.
        temperature: T; the factor keeps the gradients' size as T changes.
    """
    own, wanted = soften(student, temperature), soften(teacher.detach(), temperature)
    return F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1).mean() * temperature**2


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels, the mean over heads and labelled examples; 0 where none is labelled.

    Args:
        student: (H, B, C).
        labels: (B,) int64, UNLABELLED where there is none.
    """
    known = labels != UNLABELLED
    rows = student[:, known].flatten(0, 1)
    if not len(rows):
        return student.sum() * 0
    return F.nll_loss(rows, labels[known].repeat(len(student)))


def joint_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, label_weight: float) -> Tensor:
    """(1 - w) times the loss of soft targets plus w times that of labels, where there are any."""
    soft = soft_target_loss(student, teacher, temperature)
    if not label_weight or not bool((labels != UNLABELLED).any()):
        return soft
    return (1 - label_weight) * soft + label_weight * label_loss(student, labels)
