"""A seed, or torchvision's weights -> ResNet-18 members."""

from __future__ import annotations

import argparse
import sys
import urllib.error

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from tqdm import tqdm

# Standard deviation of the noise relative to a weight's own: enough to disagree, too little to lose the labels.
NOISE = 0.05


def make_random(seed: int) -> dict[str, Tensor]:
    """A randomly initialised ResNet-18, the same for the same seed."""
    torch.manual_seed(seed)
    return resnet18().state_dict()


def perturb(state: dict[str, Tensor], seed: int, noise: float = NOISE) -> dict[str, Tensor]:
    """Adds seeded noise to convolutions and the last layer; batch norm and its statistics stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for key, value in state.items():
        if value.dim() < 2:
            changed[key] = value.clone()
            continue
        changed[key] = value + noise * value.std() * torch.randn(value.shape, generator=generator)
    return changed


def download_pretrained() -> dict[str, Tensor] | None:
    """torchvision's ImageNet weights, or None when they are not cached and the network is not there."""
    try:
        model: nn.Module = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
    except (urllib.error.URLError, OSError) as error:
        print(f"WARNING: torchvision's weights can't be had here ({error}).", file=sys.stderr)
        return None
    return model.state_dict()


def make_members(count: int, seed: int, pretrained: bool = True) -> dict[str, dict[str, Tensor]]:
    """Makes `count` state dicts of ResNet-18, by name.

    Args:
        count: how many members.
        seed: the first member's; the next have the next ones.
        pretrained: start from torchvision's weights where they can be had.
    """
    state = download_pretrained() if pretrained else None
    if state is None:
        print(
            "WARNING: these members have RANDOM weights. They show that serving works; every prediction they "
            "make is MEANINGLESS. Use your own checkpoints: ./archive.sh resnet_ens --members a.pth b.pth",
            file=sys.stderr,
        )
        return {f"random_seed{seed + i}": make_random(seed + i) for i in range(count)}
    members = {"imagenet1k_v1": state}
    for i in range(1, count):
        members[f"imagenet1k_v1_noise{seed + i}"] = perturb(state, seed + i)
    return members


def run(options: argparse.Namespace) -> int:
    """Write one file per member."""
    members = make_members(options.num_models, options.seed, not options.random)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, state in tqdm(members.items(), desc="Writing members", unit="file"):
        torch.save(state, options.output_dir / f"{name}.pth")
    print(f"Wrote {len(members)} members to {options.output_dir}")
    return 0
