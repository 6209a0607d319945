"""Turns 28x28 grey images into log-probabilities of ten digits: the network of PyTorch's MNIST example."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MnistNet(nn.Module):
    """Two convolutions and two linear layers; names and order are those of PyTorch's MNIST example.

    Checkpoints that were trained with that example load unchanged.

    Source: https://github.com/pytorch/examples/tree/main/mnist (behaviour and names; written anew).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, stride=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, stride=1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) normalised images -> (B, 10) log-probabilities."""
        hidden = F.relu(self.conv2(F.relu(self.conv1(images))))
        hidden = self.dropout1(F.max_pool2d(hidden, 2)).flatten(1)
        hidden = self.dropout2(F.relu(self.fc1(hidden)))
        return F.log_softmax(self.fc2(hidden), dim=1)
