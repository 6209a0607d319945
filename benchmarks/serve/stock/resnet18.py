"""The model file of a stock archive: torchvision's ResNet-18 with ten classes."""

from torchvision.models.resnet import BasicBlock, ResNet


class Network(ResNet):
    """TorchServe builds a model file's only class without arguments."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)
