"""Turns one image or tensor of a request into a checked PIL image or float tensor, or a ItemError."""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vmap_ensemble.errors import ItemError, TooLargeItem, UnfitItem, UnknownKind, UnreadableItem

# Pillow knows far more; what is not in this list (EPS runs Ghostscript, say) never sees a client's bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ITEM_KEYS = ("data", "b64", "image")
_ORIENTATION = 0x0112
# Pillow's own limit only warns up to twice its size; the check of max_pixels is the one that holds.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_item(item: Any) -> bytes | Tensor:
    """Read an item as the bytes of an image, or as a tensor given as nested lists of numbers.

    Args:
        item: bytes of a file; base64 text; nested lists; or a dict with one of those as data, b64 or image.

    Returns:
        The file's bytes, or a float32 tensor of any shape.

    Raises:
        ItemError: or 415 where it is none of these, 422 for lists that are no finite numeric tensor.
    """
    if isinstance(item, Mapping):
        values = [item[key] for key in ITEM_KEYS if key in item]
        if len(values) != 1 or isinstance(values[0], Mapping):
            raise UnreadableItem(f"expected a JSON object with one of {', '.join(ITEM_KEYS)}")
        return read_item(values[0])
    if isinstance(item, (bytes, bytearray)):
        return bytes(item)
    if isinstance(item, str):
        try:
            return decode_base64(item, "image")
        except ItemError:
            raise UnknownKind("the body is text; expected an image file, or base64 of one") from None
    if isinstance(item, list):
        return read_tensor(item)
    raise UnreadableItem(f"expected an image or nested lists of numbers, got {type(item).__name__}")


def read_tensor(values: list[Any]) -> Tensor:
    """Turn nested lists of numbers into a float32 tensor.

    Raises:
        ItemError: for ragged lists, other values than numbers, or NaN and infinity.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, RecursionError):
        raise UnfitItem("expected nested lists of equal lengths") from None
    if array.dtype.kind not in "iuf" or array.size == 0:
        raise UnfitItem("expected nested lists of numbers, of equal lengths and not empty")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(array.astype(np.float32))
    if not torch.isfinite(tensor).all():
        raise UnfitItem("expected finite numbers in float32, got NaN or infinity")
    return tensor


def check_shape(tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
    """Return the tensor if its shape is the expected one, else refuse it with a 422 that names both."""
    if tuple(tensor.shape) != tuple(expected):
        raise UnfitItem(f"expected a tensor of shape {list(expected)}, got {list(tensor.shape)}")
    return tensor


def decode_image(data: bytes, mode: str, max_pixels: int, short_side: int | None = None) -> Image.Image:
    """Decode an image file: upright (EXIF), 8 bits a channel, in the wanted mode.

    Args:
        data: The file; JPEG, PNG, WebP, GIF (first frame), BMP or TIFF.
        mode: `RGB` or `L`. Alpha is dropped and palettes are resolved, as torchvision's loader does.
        max_pixels: Larger images are refused before a pixel is decoded.
        short_side: Decode a JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest whose short side still has so many
            pixels; None: at its own size. Fewer coefficients are transformed back, so pixels differ a little from
            those of an image that was decoded whole and resized.

    Raises:
        ItemError: where it is no image, 413 where it is too large, 400 where it is broken.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLargeItem(f"the image has too many pixels; at most {max_pixels} are read") from None
    except UnidentifiedImageError:
        raise UnknownKind(f"the body is not an image; expected one of {', '.join(FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):
        raise UnreadableItem("the image is broken: its header can't be read") from None
    if math.prod(image.size) > max_pixels:
        width, height = image.size
        raise TooLargeItem(f"the image has {width}x{height} pixels; at most {max_pixels} are read")
    try:
        if short_side is not None:
            image.draft(None, (short_side, short_side))  # only JPEG files know how
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:  # else exif_transpose copies the image
            return to_mode(ImageOps.exif_transpose(image), mode)
        return to_mode(image, mode)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError):
        raise UnreadableItem("the image is broken or cut off: its pixels can't be read") from None


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert() would clip 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def check_resize(image: Image.Image, short_side: int, max_pixels: int) -> None:
    """Refuse an image so long and thin that resizing its short side would blow it up.

    Raises:
        ItemError: where the resized image would exceed max_pixels.
    """
    long, short = max(image.size), min(image.size)
    if long * short_side / short * short_side > max_pixels:
        raise TooLargeItem(f"an image of {image.width}x{image.height} pixels is too long and thin to resize")


def decode_base64(text: str, what: str) -> bytes:
    """Decode base64 (with or without a `data:` prefix) or refuse with a 400 that names `what`."""
    _, _, tail = text.rpartition(";base64,")
    try:
        return base64.b64decode(tail, validate=True)
    except (binascii.Error, ValueError):
        raise UnreadableItem(f"{what}: expected base64") from None
