"""The MNIST network, under the name that scripts import it by."""

from vmap_ensemble.models.mnist import MnistNet

__all__ = ["MnistNet"]
