"""MNIST members -> how long they take one after another, and as one vmapped ensemble.

python -m benchmarks.mnist_vmap --image_path data/digits/3.png --num_models 5
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measuring.vmap_comparison import Subject, build_parser, run_comparison
from training.mnist_data import normalise
from vmap_ensemble.models.mnist import MnistNet

REPOSITORY = Path(__file__).resolve().parent.parent


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
    image_path=REPOSITORY / "data" / "digits" / "3.png",
    model_path=REPOSITORY / "training" / "members" / "mnist",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser(SUBJECT, "python -m benchmarks.mnist_vmap")
    return run_comparison(SUBJECT, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
