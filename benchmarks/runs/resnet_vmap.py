"""A torchvision architecture and how a picture becomes its input: what `benchmarks.resnet_vmap` compares."""

import argparse
import sys
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import get_model, get_model_weights, list_models

from benchmarks.measuring.vmap_comparison import Subject, run_comparison
from training.options import MEMBERS
from vmap_ensemble.errors import EnsembleError


def make_subject(architecture: str) -> Subject:
    """Describe one of torchvision's classification networks, with its weights' own transform and labels.

    Raises:
        EnsembleError: torchvision has no classification network of that name.
    """
    known = list_models(module=sys.modules["torchvision.models"])
    if architecture not in known:
        raise EnsembleError(f"--architecture {architecture}: expected one of {', '.join(known)}")
    # The metadata only: nothing is downloaded.
    weights = get_model_weights(architecture).DEFAULT
    transform = weights.transforms()

    def read_image(image: Image.Image) -> Tensor:
        return transform(image.convert("RGB")).unsqueeze(0)

    return Subject(
        title=architecture,
        build=partial(get_model, architecture, weights=None),
        read_image=read_image,
        to_probabilities=partial(torch.softmax, dim=-1),
        labels=weights.meta["categories"],
        # What `python -m training.demo_resnet` writes, or your own: of resnet18, and no other network.
        model_path=MEMBERS / "resnet" if architecture == "resnet18" else None,
    )


def run(options: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    try:
        subject = make_subject(options.architecture)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_comparison(subject, options)
