"""Turns images of requests into examples: what the MNIST and torchvision handlers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.execution.int8.forward import quantise_forward
from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler
from vmap_ensemble.tasks.images.batch_rows import allocate_rows, copy_rows, join_rows
from vmap_ensemble.tasks.images.decoding import check_resize, check_shape, decode_image, read_item
from vmap_ensemble.tasks.images.settings import VisionSettings

# Scaled decoding leaves so many times the pixels that the transform resizes to: resizing then still averages, and the
# answers stay closer (benchmarks/scaled_decoding.py).
SCALED_DECODING_MARGIN = 2


class ImageEnsembleHandler(VmapEnsembleHandler):
    """An ensemble of image classifiers; a subclass says how an image becomes a tensor.

    Attributes:
        mode: Pillow mode that images are brought into, `RGB` or `L`.
        short_side: Pixels to which `transform` resizes the short side; bounds what long, thin images cost.
        channels_last: Whether batches are laid out with a pixel's channels side by side: as the chosen forward
            takes them without a copy.
    """

    settings_class = VisionSettings
    mode = "RGB"
    short_side = 256
    threads_from_bytes = 0  # Pillow decodes and resizes without the interpreter's lock
    channels_last = False

    def load_forward(self) -> EnsembleForward:
        """As for every handler; with quantization, in 8 bits.

        Raises:
            LoadError: The archive was built without samples to calibrate on, or they don't fit its members.
        """
        forward = super().load_forward()
        if not self.settings.quantization:
            return forward
        with self._phase("quantise"):
            return quantise_forward(forward, self.precision, self.collate(self.sample_examples(1)))

    def choose_execution(self, config: dict[str, Any]) -> None:
        """As for every handler; batches are laid out as what serves takes them."""
        super().choose_execution(config)
        self.channels_last = self.execution.channels_last

    def transform(self, image: Image.Image, row: Tensor) -> None:
        """Write an image as the model's input into `row`, (channels, height, width) float32 on the host."""
        raise NotImplementedError(f"{type(self).__name__} must define transform(image, row)")

    def parse(self, item: Any) -> Tensor:
        """Read an image file, base64 of one, or a tensor in the model's own input space.

        Raises:
            RequestError: 400 broken, 413 too large, 415 not an image, 422 wrong shape or not finite.
        """
        return self._fill(item, self._allocate(1)[0])

    def parse_items(self, items: Sequence[Any]) -> list[Any]:
        """As for every handler, each example written into its row of one batch; a bad item's stays unused."""
        if type(self).parse is not ImageEnsembleHandler.parse:  # one's own parse brings its own tensors
            return super().parse_items(items)
        rows = iter(self._allocate(len(items)).unbind())
        return self.try_all(lambda pair: self._fill(*pair), list(zip(items, rows, strict=True)))

    def collate(self, examples: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The batch whose rows the examples are, (B, C, H, W) on the device; copied only if they lie apart."""
        batch = join_rows(examples)
        if batch is None:
            batch = copy_rows(examples, self.channels_last, self.device.type == "cuda")
        return (batch.to(self.device, self.dtype, non_blocking=True),)

    def _allocate(self, count: int) -> Tensor:
        return allocate_rows(count, self.input_shape, self.channels_last, self.device.type == "cuda")

    def _fill(self, item: Any, row: Tensor) -> Tensor:
        read = read_item(item)
        if isinstance(read, Tensor):
            np.copyto(row.numpy(), check_shape(read, self.input_shape).numpy())
            return row
        least = SCALED_DECODING_MARGIN * self.short_side if self.settings.jpeg_scaled_decoding else None
        image = decode_image(read, self.mode, self.settings.max_pixels, least)
        check_resize(image, self.short_side, self.settings.max_pixels)
        self.transform(image, row)
        return row
