"""Turns digits into the input of the MNIST network, with the pixels and names of PyTorch's MNIST example."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser
from vmap_ensemble.tasks.images.task import ImageTask

# Mean and standard deviation of the training images, as PyTorch's example normalises them.
NORMALISER = PixelNormaliser(mean=(0.1307,), deviation=(0.3081,))
SIDE = 28


class MnistTask(ImageTask):
    """Digits, white on black. Images of other sizes are resized to 28x28 pixels.

    Note:
        The network ends in a log-softmax. The softmax of a log-softmax is the softmax, so aggregation
        gives the same probabilities as for logits.
    """

    mode = "L"
    short_side = SIDE
    light_ink = True
    threads_from_bytes = 256 << 10  # smaller images are decoded in less time than it takes to hand them to threads

    default_architecture = "mnist"
    default_input_shape = (1, SIDE, SIDE)

    def transform(self, image: Image.Image, row: Tensor) -> None:
        """Write a digit, normalised, into a (1, 28, 28) row."""
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        NORMALISER.write(image, row)

    def default_labels(self) -> dict[int, str]:
        """The ten digits."""
        return {digit: str(digit) for digit in range(10)}
