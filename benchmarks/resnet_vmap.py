"""Members of a torchvision architecture -> their time one after another, and as one vmapped ensemble.

python -m benchmarks.resnet_vmap --image_path data/images/sample.jpg --num_models 3 --model_path resnet18.pth
"""

import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import get_model, get_model_weights, list_models

from benchmarks.measuring.vmap_comparison import Subject, build_parser, run_comparison
from vmap_ensemble.errors import EnsembleError

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGE_PATH = REPOSITORY / "data" / "images" / "sample.jpg"
MEMBER_DIR = REPOSITORY / "training" / "members" / "resnet"


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
        image_path=IMAGE_PATH,
        # What `python -m training.demo_resnet` writes, or your own: of resnet18, and no other network.
        model_path=MEMBER_DIR if architecture == "resnet18" else None,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser(make_subject("resnet18"), "python -m benchmarks.resnet_vmap")
    parser.add_argument("--architecture", default="resnet18", help="name of a torchvision classifier")
    options = parser.parse_args(arguments)
    try:
        subject = make_subject(options.architecture)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_comparison(subject, options)


if __name__ == "__main__":
    sys.exit(main())
