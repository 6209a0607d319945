"""Serves an ensemble of torchvision image classifiers: ResNet by default, any architecture by name."""

from vmap_ensemble.frontends.torchserve.handler import TorchServeHandler
from vmap_ensemble.tasks.images.torchvision import TorchvisionTask


class ResNetHandler(TorchServeHandler, TorchvisionTask):
    """Transforms and labels come from the torchvision weights' metadata; index_to_name.json overrides labels."""
