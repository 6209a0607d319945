"""Turns images into examples, and their classification into answers: what tasks on images have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vmap_ensemble.archive.precision import Precision
from vmap_ensemble.core.forward import Forward, as_one_vmap
from vmap_ensemble.errors import UnfitItem, UnknownKind, UnreadableItem
from vmap_ensemble.execution.int8.forward import quantise_forward
from vmap_ensemble.tasks.budget import Budget
from vmap_ensemble.tasks.images.batch_rows import allocate_rows, copy_rows, join_rows
from vmap_ensemble.tasks.images.decoding import (
    ITEM_KEYS,
    check_resize,
    check_shape,
    count_pixels,
    decode_image,
    read_item,
    to_8_bits,
    to_mode,
)
from vmap_ensemble.tasks.images.settings import VisionSettings
from vmap_ensemble.tasks.task import Task

# Scaled decoding leaves so many times the pixels that the transform resizes to: resizing then still averages, and the
# answers stay closer (benchmarks/scaled_decoding.py).
SCALED_DECODING_MARGIN = 2


class ImageTask(Task):
    """Classification of images; a subclass says how an image becomes a tensor.

    Attributes:
        mode: Pillow mode that images are brought into, `RGB` or `L`.
        short_side: Pixels to which `transform` resizes the short side; bounds what long, thin images cost.
        light_ink: Whether drawings that stand in alpha alone become white on black, whatever their ink.
        channels_last: Whether batches are laid out with a pixel's channels side by side: as the chosen forward
            takes them without a copy.
    """

    settings_class: type[VisionSettings] = VisionSettings
    mode = "RGB"
    short_side = 256
    threads_from_bytes = 0  # Pillow decodes and resizes without the interpreter's lock
    channels_last = False
    light_ink = False

    @property
    def item_keys(self) -> tuple[str, ...] | None:
        """Keys that an item which is an object may have; any, where `parse` is one's own."""
        return ITEM_KEYS if type(self).parse is ImageTask.parse else None

    def quantise(self, forward: Forward, precision: Precision | None) -> Forward:
        """By the ranges of activations that the archive's samples gave.

        Raises:
            LoadError: The archive was built without samples to calibrate on, or they don't fit its members.
        """
        return quantise_forward(as_one_vmap(forward), precision, self.collate(self.sample_examples(1)))

    def lay_out(self, channels_last: bool) -> None:
        """Batches are written in the memory format that the forward takes."""
        self.channels_last = channels_last

    def transform(self, image: Image.Image, row: Tensor) -> None:
        """Write an image as the model's input into `row`, (channels, height, width) float32 on the host."""
        raise NotImplementedError(f"{type(self).__name__} must define transform(image, row)")

    def parse(self, item: Any) -> Tensor:
        """Read an image file, base64 of one, a Pillow image, or a tensor in the model's own input space.

        Raises:
            ItemError: Broken, too large, not an image, of the wrong shape or not finite.
        """
        return self._fill(item, self._allocate(1)[0])

    def check_size(self, items: Sequence[Any]) -> None:
        """Count the pixels of a request's files by their headers, before any is decoded.

        Raises:
            TooLargeItem: They are more than `max_request_pixels`, by default twice `max_pixels`.
        """
        if len(items) < 2:
            return  # `max_pixels` is the limit of one
        settings = self.settings
        budget = Budget(settings.max_request_pixels or 2 * settings.max_pixels, "pixels", "max_request_pixels")
        for item in items:
            with suppress(UnreadableItem, UnknownKind, UnfitItem):  # said when it is parsed
                budget.spend(count_pixels(read_item(item)))

    def parse_items(self, items: Sequence[Any]) -> list[Any]:
        """As for every task, each example written into its row of one batch; a bad item's stays unused."""
        if type(self).parse is not ImageTask.parse:  # one's own parse brings its own tensors
            return super().parse_items(items)
        rows = iter(self._allocate(len(items)).unbind())
        return self.try_all(lambda pair: self._fill(*pair), list(zip(items, rows, strict=True)))

    def collate(self, examples: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The batch whose rows the examples are, (B, C, H, W) on the device; copied only if they lie apart."""
        place = self.place
        batch = join_rows(examples)
        if batch is None:
            batch = copy_rows(examples, self.channels_last, place.device.type == "cuda")
        return (batch.to(place.device, place.dtype, non_blocking=True),)

    def _allocate(self, count: int) -> Tensor:
        return allocate_rows(count, self.input_shape, self.channels_last, self.place.device.type == "cuda")

    def _fill(self, item: Any, row: Tensor) -> Tensor:
        read = item if isinstance(item, (Tensor, Image.Image)) else read_item(item)
        if isinstance(read, Tensor):
            np.copyto(row.numpy(), check_shape(read, self.input_shape).cpu().numpy())
            return row
        image = self._bring(read) if isinstance(read, Image.Image) else self._decode(read)
        check_resize(image, self.short_side, self.settings.max_pixels)
        self.transform(image, row)
        return row

    def _decode(self, data: bytes) -> Image.Image:
        least = SCALED_DECODING_MARGIN * self.short_side if self.settings.jpeg_scaled_decoding else None
        settings = self.settings
        return decode_image(data, self.mode, settings.max_pixels, least, settings.background, self.light_ink)

    def _bring(self, image: Image.Image) -> Image.Image:
        """A Pillow image that came as one, in this task's mode."""
        return to_mode(to_8_bits(image, image), self.mode, self.settings.background, self.light_ink)
