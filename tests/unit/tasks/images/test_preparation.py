"""mean, std, resize, crop and interpolation: pixel for pixel what torchvision's own transforms give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights
from torchvision.transforms import InterpolationMode, v2

from vmap_ensemble.archive.settings import parse_settings
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.tasks.images.torchvision import TorchvisionTask
from vmap_ensemble.tasks.task import Place

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def photo(height: int = 90, width: int = 120) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepare(image: Image.Image, **settings) -> torch.Tensor:
    task = TorchvisionTask(parse_settings(settings, TorchvisionTask.settings_class, "settings"), Place())
    row = torch.empty(task.input_shape)
    task.transform(image, row)
    return row


def torchvisions(image: Image.Image, resize, crop, mean=MEAN, std=STD, interpolation="bilinear") -> torch.Tensor:
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToPILImage(),
            v2.Resize(resize, interpolation=InterpolationMode(interpolation)),
            v2.CenterCrop(crop),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )(image)


@pytest.mark.parametrize(
    ("resize", "crop", "own"),
    [
        (64, [48, 48], {"resize": 64, "crop": 48}),
        ([70, 80], [48, 64], {"resize": [70, 80], "crop": [48, 64]}),
        ([55], [48, 48], {"crop": 48}),  # ResNet-18 resizes to 256 for a crop of 224
        ([55], [48, 48], {"input_shape": [3, 48, 48]}),
    ],
)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_are_torchvisions(resize, crop, own, interpolation) -> None:
    image = photo()
    got = prepare(image, mean=MEAN, std=STD, interpolation=interpolation, **own)
    torch.testing.assert_close(got, torchvisions(image, resize, crop, interpolation=interpolation), atol=1e-6, rtol=0)


def test_what_is_not_said_is_the_weights_own() -> None:
    preset = ResNet18_Weights.DEFAULT.transforms()
    image = photo(300, 400)
    torch.testing.assert_close(prepare(image), preset(image), atol=1e-6, rtol=0)
    got = prepare(image, mean=[0.0, 0.0, 0.0])
    preset.mean = [0.0, 0.0, 0.0]
    torch.testing.assert_close(got, preset(image), atol=1e-6, rtol=0)


def test_a_network_that_torchvision_does_not_know_needs_all_five() -> None:
    five = {"mean": MEAN, "std": STD, "resize": 64, "crop": 48, "interpolation": "bicubic"}
    image = photo()
    got = prepare(image, architecture="model.py:Net", **five)
    expected = torchvisions(image, 64, [48, 48], interpolation="bicubic")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    for key in five:
        rest = {name: value for name, value in five.items() if name != key}
        with pytest.raises(SettingsError, match="or all of resize, crop, mean, std, interpolation"):
            prepare(image, architecture="model.py:Net", **rest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": [0.1, 0.0, 0.1]}, "std: expected numbers above 0"),
        ({"mean": [123.7, 116.3, 103.5]}, "divide those for pixels from 0 to 255 by 255"),
        ({"mean": [0.5]}, "mean"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "mean"),
        ({"std": [0.2, float("nan"), 0.2]}, "std"),
        ({"mean": [-5, 0.5, 0.5]}, "mean"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"crop": 0}, "crop"),
        ({"crop": 32, "input_shape": [3, 64, 64]}, "crop: is 32, input_shape says"),
        ({"resize": 32, "crop": 64}, "resize: expected at least the crop"),
        ({"reszie": 32}, "resize"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message) -> None:
    with pytest.raises(SettingsError, match=message):
        prepare(photo(), **settings)
