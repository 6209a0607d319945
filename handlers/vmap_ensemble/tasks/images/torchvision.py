"""Turns images into the input of a torchvision classifier, as its weights' own transform does."""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.models import get_model_weights, get_weight
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import torchvision_name
from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser
from vmap_ensemble.tasks.images.settings import PREPARATION, TorchvisionSettings, both
from vmap_ensemble.tasks.images.task import ImageTask


class TorchvisionTask(ImageTask):
    """Transforms and labels come from the torchvision weights' metadata; index_to_name.json overrides labels."""

    default_architecture = "torchvision:resnet18"

    settings_class = TorchvisionSettings

    @functools.cached_property
    def weights(self) -> Any:
        """The torchvision weights entry whose transforms and labels are used; None where the settings say it all."""
        try:
            if self.settings.transforms:
                return get_weight(self.settings.transforms)
            return get_model_weights(torchvision_name(self.architecture)).DEFAULT
        except ValueError as error:
            if not self.settings.transforms and not self._missing():
                return None
            raise SettingsError(
                "setup_config.json: transforms: expected the name of torchvision weights such as "
                f"'ResNet18_Weights.IMAGENET1K_V1', got {self.settings.transforms or self.architecture!r} ({error}); "
                f"or all of {', '.join(PREPARATION)}"
            ) from None

    def _missing(self) -> list[str]:
        """What the settings leave to the weights."""
        given = {key: getattr(self.settings, key) for key in PREPARATION}
        given["crop"] = given["crop"] or self.settings.input_shape
        return [key for key, value in given.items() if value is None]

    @functools.cached_property
    def preset(self) -> Any:
        """The weights' transform (resize, crop, normalise), with what the settings say instead."""
        preset = ImageClassification(crop_size=1) if self.weights is None else self.weights.transforms()
        if not isinstance(preset, ImageClassification):
            raise SettingsError(
                f"setup_config.json: transforms: expected weights of an image classifier, got {self.weights}"
            )
        settings = self.settings
        crop = settings.crop if settings.input_shape is None else tuple(settings.input_shape[1:])
        if crop is not None:
            height, width = both(crop)
            ratio = preset.resize_size[0] / preset.crop_size[0]
            preset.crop_size, preset.resize_size = [height, width], [round(max(height, width) * ratio)]
        if settings.resize is not None:
            preset.resize_size = [settings.resize] if isinstance(settings.resize, int) else list(settings.resize)
        self._check_sizes(preset)
        preset.mean = list(settings.mean or preset.mean)
        preset.std = list(settings.std or preset.std)
        if settings.interpolation:
            preset.interpolation = InterpolationMode(settings.interpolation)
        return preset

    def _check_sizes(self, preset: Any) -> None:
        """Refuse a crop that would be padded with black: nobody wants that without knowing.

        Raises:
            SettingsError: Names both.
        """
        if self.settings.resize is None:
            return
        crop = both(tuple(preset.crop_size))
        least = tuple(preset.resize_size) if len(preset.resize_size) == 2 else tuple(preset.resize_size) * 2
        if any(side > room for side, room in zip(crop, least, strict=True)):
            raise SettingsError(
                f"setup_config.json: resize: expected at least the crop, {list(crop)}, got {self.settings.resize}"
            )

    @property
    def short_side(self) -> int:  # type: ignore[override]
        """Side that the transform resizes to, the longer one of two."""
        return int(max(self.preset.resize_size))

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
        if self.weights is None:
            return None
        categories = self.weights.meta["categories"]
        classes = self.settings.num_classes
        return dict(enumerate(categories)) if classes in (None, len(categories)) else None
