"""MNIST's network and how a picture becomes its input: what `benchmarks.mnist_vmap` compares."""

import argparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measuring.vmap_comparison import Subject, run_comparison
from training.options import MEMBERS
from training.runs.mnist_data import normalise
from vmap_ensemble.models.mnist import MnistNet


def read_digit(image: Image.Image) -> Tensor:
    """Turn a picture of a digit, light on dark, into (1, 1, 28, 28) as MNIST's training images are."""
    grey = image.convert("L").resize((28, 28), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(grey)).unsqueeze(0))


SUBJECT = Subject(
    title="MnistNet",
    build=MnistNet,
    read_image=read_digit,
    to_probabilities=torch.exp,  # its outputs are log-probabilities
    labels=[str(digit) for digit in range(10)],
    model_path=MEMBERS / "mnist",
)


def run(options: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    return run_comparison(SUBJECT, options)
