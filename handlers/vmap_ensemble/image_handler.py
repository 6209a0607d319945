"""Turns images of requests into examples: what the MNIST and torchvision handlers have in common."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from vmap_ensemble.base_handler import VmapEnsembleHandler
from vmap_ensemble.execution import Candidate, Execution
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.images import check_resize, check_shape, decode_image, read_item
from vmap_ensemble.quantised_forward import QuantisedForward, quantise_forward
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
        """As for every handler; 8-bit members have one way to run, since float32 would give other answers."""
        if not isinstance(self.forward, QuantisedForward):
            return super().choose_execution(config)
        self.execution = Execution("int8", f"asked for: {self.forward.reason}", [Candidate("int8")], self.forward)
        self.run = self.chunked(self.execution)

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
