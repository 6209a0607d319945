"""Turns images of requests into examples: what the MNIST and torchvision handlers have in common."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from vmap_ensemble.base_handler import VmapEnsembleHandler
from vmap_ensemble.images import check_resize, check_shape, decode_image, read_item
from vmap_ensemble.settings import VisionSettings


class ImageEnsembleHandler(VmapEnsembleHandler):
    """An ensemble of image classifiers; a subclass says how an image becomes a tensor.

    Attributes:
        mode: Pillow mode that images are brought into, `RGB` or `L`.
        short_side: Pixels to which `transform` resizes the short side; bounds what long, thin images cost.
    """

    settings_class = VisionSettings
    mode = "RGB"
    short_side = 256
    parses_in_threads = True  # Pillow decodes and resizes without the interpreter's lock

    def transform(self, image: Image.Image) -> Tensor:
        """Turn an image into the model's input, (channels, height, width)."""
        raise NotImplementedError(f"{type(self).__name__} must define transform(image)")

    def parse(self, item: Any) -> Tensor:
        """Read an image file, base64 of one, or a tensor in the model's own input space.

        Raises:
            RequestError: 400 broken, 413 too large, 415 not an image, 422 wrong shape or not finite.
        """
        read = read_item(item)
        if isinstance(read, Tensor):
            return check_shape(read, self.input_shape)
        image = decode_image(read, self.mode, self.settings.max_pixels)
        check_resize(image, self.short_side, self.settings.max_pixels)
        return self.transform(image)
