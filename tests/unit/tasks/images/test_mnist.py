"""The MNIST handler against torchvision's transforms and the plain network."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms


@pytest.mark.parametrize("size", [(28, 28), (100, 50), (1, 1)])
def test_image_equals_torchvisions_transform(size, make_mnist, ask, image_file):
    handler, models = make_mnist(2)
    data = image_file(np.random.default_rng(0).integers(0, 256, size))
    ((_, answer),) = ask(handler, [{"body": data}])
    image = Image.open(io.BytesIO(data)).resize((28, 28), Image.Resampling.BILINEAR)
    example = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    with torch.inference_mode():
        # The network ends in a log-softmax: its exponential is the probability, with no softmax of ours.
        expected = torch.stack([m(example(image)[None]).exp() for m in models.values()]).mean(0)[0]
    assert answer["prediction"]["label"] == str(int(expected.argmax()))
    assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)
