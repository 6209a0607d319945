"""The settings of tasks on images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from vmap_ensemble.archive.settings import PositiveInt, Settings


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class VisionSettings(Settings):
    """Settings of handlers that take images."""

    transforms: str | None = Field(
        None,
        description="torchvision weights whose transforms and labels are used, such as "
        "`ResNet18_Weights.IMAGENET1K_V1`; the architecture's default weights when not given.",
    )
    max_pixels: PositiveInt = Field(50_000_000, description="Larger images are refused with a 413.")
    max_request_pixels: PositiveInt | None = Field(
        None,
        description="Pixels over all images of a request, twice `max_pixels` by default; more get a 413.",
    )
    background: Literal["white", "black"] | None = Field(
        None,
        description="What images with alpha are laid on. By default alpha is dropped, but drawings that stand in "
        "alpha alone (a canvas' PNG) are laid on white, or on black if their ink is light; digits become white on "
        "black.",
    )
    jpeg_scaled_decoding: bool = Field(
        False,
        description="Decode JPEG files at 1/2, 1/4 or 1/8 of their size where twice the pixels are left that the "
        "transform resizes to: faster for large photos, and not quite the same pixels (docs/resnet.md).",
    )
    quantization: Literal["int8"] | None = Field(
        None,
        description="`int8`: convolutions and large linear layers with 8-bit weights and activations, on a CPU; "
        "the archive is built with `--samples` (docs/precision.md).",
    )

    @model_validator(mode="after")
    def _image_shape(self) -> VisionSettings:
        if self.input_shape is not None and len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {list(self.input_shape)}")
        return self

    @model_validator(mode="after")
    def _quantization_alone(self) -> VisionSettings:
        if self.quantization and self.dtype != "fp32":
            raise ValueError(f"quantization {self.quantization} starts from dtype fp32, got dtype {self.dtype}")
        if self.quantization and self.execution not in ("auto", "prepared"):
            raise ValueError(
                f"quantization {self.quantization} has one way to run; expected execution auto or prepared, "
                f"got {self.execution}"
            )
        return self
