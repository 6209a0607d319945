"""Turns images into the input of a torchvision classifier, as its weights' own transform does."""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.models import get_model_weights, get_weight
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import torchvision_name
from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser
from vmap_ensemble.tasks.images.task import ImageTask


class TorchvisionTask(ImageTask):
    """Transforms and labels come from the torchvision weights' metadata; index_to_name.json overrides labels."""

    default_architecture = "torchvision:resnet18"

    @functools.cached_property
    def weights(self) -> Any:
        """The torchvision weights entry whose transforms and labels are used."""
        try:
            if self.settings.transforms:
                return get_weight(self.settings.transforms)
            return get_model_weights(torchvision_name(self.architecture)).DEFAULT
        except ValueError as error:
            raise SettingsError(
                "setup_config.json: transforms: expected the name of torchvision weights such as "
                f"'ResNet18_Weights.IMAGENET1K_V1', got {self.settings.transforms or self.architecture!r} ({error})"
            ) from None

    @functools.cached_property
    def preset(self) -> Any:
        """The transform that belongs to the weights: resize, crop, normalise; to the settings' size if given."""
        preset = self.weights.transforms()
        if not isinstance(preset, ImageClassification):
            raise SettingsError(
                f"setup_config.json: transforms: expected weights of an image classifier, got {self.weights}"
            )
        if self.settings.input_shape is None:
            return preset
        height, width = self.settings.input_shape[1:]
        ratio = preset.resize_size[0] / preset.crop_size[0]
        preset.crop_size, preset.resize_size = [height, width], [round(max(height, width) * ratio)]
        return preset

    @property
    def short_side(self) -> int:  # type: ignore[override]
        """Side that the transform resizes to."""
        return int(self.preset.resize_size[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(3, height, width) that the transform crops to."""
        sides = [int(side) for side in self.preset.crop_size]
        return (3, *(sides if len(sides) == 2 else sides * 2))

    @functools.cached_property
    def normaliser(self) -> PixelNormaliser:
        """Mean and deviation of the weights' transform."""
        return PixelNormaliser(self.preset.mean, self.preset.std)

    def transform(self, image: Image.Image, row: Tensor) -> None:
        """Write an RGB image, resized, cropped and normalised as the preset does it, into a (3, crop, crop) row."""
        preset = self.preset
        image = F.resize(image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias)
        self.normaliser.write(F.center_crop(image, preset.crop_size), row)

    def default_labels(self) -> dict[int, str] | None:
        """The categories of the weights, where the members have as many classes."""
        categories = self.weights.meta["categories"]
        classes = self.settings.num_classes
        return dict(enumerate(categories)) if classes in (None, len(categories)) else None
