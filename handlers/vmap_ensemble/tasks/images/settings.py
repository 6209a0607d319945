"""The settings of tasks on images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from vmap_ensemble.archive.settings import PositiveInt, QuantisableSettings


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class VisionSettings(QuantisableSettings):
    """Settings of handlers that take images."""

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

    @model_validator(mode="after")
    def _image_shape(self) -> VisionSettings:
        if self.input_shape is not None and len(self.input_shape) != 3:
            raise ValueError(f"input_shape: expected (channels, height, width), got {list(self.input_shape)}")
        return self


# Settings that say all of how an image is prepared.
PREPARATION = ("resize", "crop", "mean", "std", "interpolation")
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Triple = Annotated[tuple[Finite, ...], Field(min_length=3, max_length=3)]
Sides = PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=2)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class TorchvisionSettings(VisionSettings):
    """Settings of the handler of torchvision's classifiers: how images are prepared.

    Each of the five keys replaces what the transforms say; all five, without `transforms`, are enough for a network
    that torchvision doesn't know.
    """

    transforms: str | None = Field(
        None,
        description="torchvision weights whose transforms and labels are used, such as "
        "`ResNet18_Weights.IMAGENET1K_V1`; the architecture's default weights when not given.",
    )
    resize: Sides | None = Field(
        None,
        description="Pixels of the shorter side that images are resized to, or [height, width]. By default what the "
        "transforms say, in the same ratio to `crop` or `input_shape` where one of these is given.",
    )
    crop: Sides | None = Field(
        None, description="Pixels of the square that is cut out of the middle, or [height, width]."
    )
    mean: Triple | None = Field(None, description="Of red, green and blue, where pixels are from 0 to 1.")
    std: Triple | None = Field(None, description="Deviation of red, green and blue, where pixels are from 0 to 1.")
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = (
        Field(None, description="How images are resized.")
    )

    @model_validator(mode="after")
    def _preparation(self) -> TorchvisionSettings:
        if self.std is not None and not min(self.std) > 0:
            raise ValueError(f"std: expected numbers above 0, got {list(self.std)}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and max(values) > 1:
                raise ValueError(
                    f"{name}: expected numbers for pixels from 0 to 1, got {list(values)}; divide those for pixels "
                    "from 0 to 255 by 255"
                )
        if self.crop is not None and self.input_shape is not None and both(self.crop) != tuple(self.input_shape[1:]):
            raise ValueError(f"crop: is {self.crop}, input_shape says {list(self.input_shape[1:])}; give one of them")
        return self


def both(sides: int | tuple[int, ...]) -> tuple[int, ...]:
    """(height, width) of a square or a pair."""
    pair = (sides,) if isinstance(sides, int) else tuple(sides)
    return pair * 2 if len(pair) == 1 else pair
