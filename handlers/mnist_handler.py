"""Serves an ensemble of MNIST classifiers with the network and names of PyTorch's MNIST example."""

from vmap_ensemble.frontends.torchserve.handler import TorchServeHandler
from vmap_ensemble.tasks.images.mnist import MnistTask


class MnistHandler(TorchServeHandler, MnistTask):
    """Digits, white on black."""
