"""Turns examples into others near them and between them, on which members disagree more than on what trained them.

Members agree on the examples that they were trained on, so that a student which sees these alone learns one opinion N
times. What is changed at random is already less familiar; a step along the gradient of a random member's random
combination of classes goes where the members' functions part.

Source: Nam et al., Diversity Matters When Learning From Ensembles, https://arxiv.org/abs/2110.14149; Tashiro et al.,
Output Diversified Sampling, https://arxiv.org/abs/2003.06878; Zhang et al., mixup, https://arxiv.org/abs/1710.09412;
Yun et al., CutMix, https://arxiv.org/abs/1905.04899
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "plain", "diverse")
# Share of a batch that is changed; the others are asked about once and for all.
CHANGED = 0.5
# Of rotation in radians, and of size and place as shares.
TURN, SCALE, MOVE = 0.25, 0.15, 0.12
NOISE, STEP = 0.4, 0.3
# Most of a text's tokens that are replaced.
REPLACED = 0.3


def change(batch: Tensor) -> Tensor:
    """Examples moved, mixed with one another and with noise: (B, ...) -> the same shape, by torch's generator.

    Note:
        Images, (B, C, H, W), are turned and moved a little, and one half of those that are mixed are mixed in place:
        a rectangle of another. Other tensors are mixed and noisy alone.
    """
    is_images = batch.dim() == 4
    moved = move_images(batch) if is_images else batch
    partner = moved[torch.randperm(len(batch))]
    kind = torch.rand(len(batch))
    mixed = torch.where(_rows(kind < 1 / 3, batch), mix(moved, partner), moved)
    if is_images:
        mixed = torch.where(_rows(kind > 2 / 3, batch), cut_and_mix(moved, partner), mixed)
    amount = NOISE * _rows(torch.rand(len(batch)).square(), batch) * batch.std()
    return mixed + amount * torch.randn(batch.shape).to(batch)


def mix(batch: Tensor, partner: Tensor) -> Tensor:
    """Each example and its partner in a random proportion."""
    share = _rows(torch.rand(len(batch)), batch)
    return share * batch + (1 - share) * partner


def cut_and_mix(batch: Tensor, partner: Tensor) -> Tensor:
    """Each image with a rectangle of its partner: up to the whole width and height."""
    height, width = batch.shape[-2:]
    masks = []
    for size in (height, width):
        ends = (torch.rand(len(batch), 2) * (size + 1)).long().sort(1).values
        places = torch.arange(size)
        masks.append((places >= ends[:, :1]) & (places < ends[:, 1:]))
    inside = (masks[0][:, :, None] & masks[1][:, None, :])[:, None].to(batch.device)
    return torch.where(inside, partner, batch)


def move_images(images: Tensor) -> Tensor:
    """Each image turned, scaled and moved a little; what comes in from outside is the border's colour."""
    turn, scale, across, down = (torch.rand(4, len(images)) * 2 - 1).unbind()
    turn, scale = turn * TURN, 1 + scale * SCALE
    rows = [
        torch.stack((turn.cos() * scale, -turn.sin() * scale, across * 2 * MOVE), -1),
        torch.stack((turn.sin() * scale, turn.cos() * scale, down * 2 * MOVE), -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def seek_disagreement(batch: Tensor, member: Callable[[Tensor], Tensor], step: float = STEP) -> Tensor:
    """Each example a step further along the gradient of a random combination of one member's log-probabilities.

    Args:
        batch: (B, ...).
        member: (B, ...) -> (B, C) log-probabilities of a member, through which a gradient flows.
        step: Root mean square of the step, in standard deviations of the batch.
    """
    with torch.enable_grad():
        moving = batch.detach().requires_grad_()
        said = member(moving)
        direction = (torch.rand(said.shape) * 2 - 1).to(said)
        (gradient,) = torch.autograd.grad((direction * said).sum(), moving)
    size = gradient.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
    return batch + step * batch.std() * gradient / _rows(size, batch)


def change_tokens(ids: Tensor, mask_id: int, special: Tensor) -> Tensor:
    """Token ids (B, S), some replaced by the mask token, some by the token that a text beside has in their place.

    Args:
        ids: On any device; what is in `special` stays, padding among it.
        mask_id: Of the tokenizer.
        special: Ids that are never replaced, nor replace others.

    Source: Tang et al., Distilling Task-Specific Knowledge from BERT, https://arxiv.org/abs/1903.12136
    """
    kept = torch.isin(ids, special.to(ids))
    share = _rows(torch.rand(len(ids)), ids) * REPLACED
    kind = torch.rand(ids.shape).to(ids.device)
    partner = ids[torch.randperm(len(ids)).to(ids.device)]
    usable = ~torch.isin(partner, special.to(ids))
    changed = torch.where(kind < share / 2, torch.full_like(ids, mask_id), ids)
    changed = torch.where((kind >= share / 2) & (kind < share) & usable, partner, changed)
    return torch.where(kept, ids, changed)


def _rows(values: Tensor, batch: Tensor) -> Tensor:
    """(B,) numbers, to be broadcast over the examples of a batch."""
    return values.to(batch.device).reshape(-1, *[1] * (batch.dim() - 1))
