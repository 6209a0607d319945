"""Serves an ensemble of MNIST classifiers with the network and names of PyTorch's MNIST example."""

from __future__ import annotations

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from vmap_ensemble.image_handler import ImageEnsembleHandler

# Mean and standard deviation of the training images, as PyTorch's example normalises them.
MEAN, STD = (0.1307,), (0.3081,)
SIDE = 28


class MnistHandler(ImageEnsembleHandler):
    """Digits, white on black. Images of other sizes are resized to 28x28 pixels.

    Note:
        The network ends in a log-softmax. The softmax of a log-softmax is the softmax, so aggregation
        gives the same probabilities as for logits.
    """

    mode = "L"
    short_side = SIDE
    parses_in_threads = False  # a digit is decoded in less time than it takes to hand it to a thread

    default_architecture = "mnist"
    default_input_shape = (1, SIDE, SIDE)

    def transform(self, image: Image.Image) -> Tensor:
        """Turn a digit into a normalised (1, 28, 28) float32 tensor."""
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return F.normalize(F.to_tensor(image), list(MEAN), list(STD))

    def default_labels(self) -> dict[int, str]:
        """The ten digits."""
        return {digit: str(digit) for digit in range(10)}
