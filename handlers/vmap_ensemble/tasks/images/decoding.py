"""Turns one image or tensor of a request into a checked PIL image or float tensor, or a ItemError."""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vmap_ensemble.errors import ItemError, TooLargeItem, UnfitItem, UnknownKind, UnreadableItem

# Pillow knows far more; what is not in this list (EPS runs Ghostscript, say) never sees a client's bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ITEM_KEYS = ("data", "b64", "image", "base64")
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
# A data: URL says what it holds, in either case, before this.
_PREFIX_ENDS, _LONGEST_PREFIX = ";base64,", 512
Background = Literal["white", "black"]
# Colours that lie no further apart show no drawing: what there is to see stands in alpha.
_ONE_COLOUR = 32
# Pillow's own limit only warns up to twice its size; the check of max_pixels is the one that holds.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_item(item: Any) -> bytes | Tensor:
    """Read an item as the bytes of an image, or as a tensor given as nested lists of numbers.

    Args:
        item: bytes of a file; base64 text; nested lists; or a dict with one of those as data, b64, image or base64.

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
        got = str(list(tensor.shape))
        raise UnfitItem(f"expected a tensor of shape {list(expected)}, got {got[:80]}")
    return tensor


def count_pixels(item: bytes | Tensor) -> int:
    """The pixels of an image file by its header, or the numbers of a tensor: what a request's budget counts.

    Args:
        item: As `read_item` returns it.

    Returns:
        0 where the header can't be read: `decode_image` says what is wrong.
    """
    if isinstance(item, Tensor):
        return item.numel()
    try:
        return math.prod(Image.open(io.BytesIO(item), formats=FORMATS).size)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError):
        return 0


def decode_image(
    data: bytes,
    mode: str,
    max_pixels: int,
    short_side: int | None = None,
    background: Background | None = None,
    light_ink: bool = False,
) -> Image.Image:
    """Decode an image file: upright (EXIF), 8 bits a channel, in the wanted mode.

    Args:
        data: The file; JPEG, PNG, WebP, GIF (first frame), BMP or TIFF.
        mode: `RGB` or `L`. Palettes are resolved, as torchvision's loader does.
        max_pixels: Larger images are refused before a pixel is decoded.
        short_side: Decode a JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest whose short side still has so many
            pixels; None: at its own size. Fewer coefficients are transformed back, so pixels differ a little from
            those of an image that was decoded whole and resized.
        background: What images with alpha are laid on. None: alpha is dropped, as torchvision's loader does, but of
            drawings that stand in alpha alone (a canvas' PNG): those are laid on white, or on black if their ink is
            light.
        light_ink: Such drawings become white on black, whatever their ink: what models of digits expect.

    Raises:
        ItemError: where it is no image, or its numbers have no known white; 413 where it is too large, 400
            where it is broken, 422 where a drawing has the colour of its background.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLargeItem(f"the image has too many pixels; at most {max_pixels} are read") from None
    except UnidentifiedImageError:
        raise UnknownKind(f"the body is not an image; expected one of {', '.join(FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):
        raise UnreadableItem("the image is broken: its header can't be read") from None
    if math.prod(opened.size) > max_pixels:
        width, height = opened.size
        raise TooLargeItem(f"the image has {width}x{height} pixels; at most {max_pixels} are read")
    try:
        if short_side is not None:
            opened.draft(None, (short_side, short_side))  # only JPEG files know how
        opened.load()
        # exif_transpose copies an image that is upright, too.
        is_upright = opened.getexif().get(_ORIENTATION, 1) == 1
        image = opened if is_upright else ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError):
        raise UnreadableItem("the image is broken or cut off: its pixels can't be read") from None
    return to_mode(to_8_bits(image, opened), mode, background, light_ink)


def to_mode(image: Image.Image, mode: str, background: Background | None, light_ink: bool) -> Image.Image:
    """An image of 8 bits a channel in the wanted mode, without alpha; arguments as of `decode_image`.

    Raises:
        ItemError: Its mode has no way into the wanted one, or a drawing has the colour of its background.
    """
    if image.has_transparency_data:
        image = _lay_on(image.convert("RGBA"), background, light_ink)
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError:
        raise UnknownKind(f"images of mode {image.mode} can't be read; send RGB or grey") from None


def to_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Scale grey images of more bits by what is white in them; others stay as they are.

    `convert` would clip them at 255: 16 bits were nearly white, floats of 0 to 1 black.

    Args:
        image: The pixels.
        opened: The image as it was opened, which knows the file's header.

    Raises:
        ItemError: for numbers whose white nothing tells.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image) >> (_bits(opened) - 8)
    elif image.mode == "I" and opened.format == "PNG":  # 16 bits, as older releases of Pillow read them
        values = np.asarray(image) >> 8
    elif image.mode == "F":
        values = np.asarray(image) * 255
        # Half a step beyond either end still rounds to black or white; NaN compares false.
        if not ((values >= -0.5) & (values <= 255.5)).all():
            raise UnknownKind("the image holds floats beyond 0 to 1; send 8 or 16 bits a pixel, or a tensor")
        values = values.round()
    elif image.mode == "I" or _tag(opened, _SAMPLE_FORMAT) == _SIGNED:
        raise UnknownKind(
            "the image holds wide or signed integers, whose white is unknown; send 8 or 16 bits a pixel"
        )
    else:
        return image
    values = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if _tag(opened, _PHOTOMETRIC) == _WHITE_IS_ZERO else values)


def _bits(image: Image.Image) -> int:
    """Bits of a sample: TIFF files may hold 12 of 16."""
    return min(max(int(_tag(image, _BITS_PER_SAMPLE) or 16), 8), 16)


def _tag(image: Image.Image, number: int) -> int | None:
    """A number of a TIFF file's header."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _lay_on(image: Image.Image, background: Background | None, light_ink: bool) -> Image.Image:
    """An RGBA image without its alpha: laid on a background, or alpha dropped where the colours show all there is."""
    *colours, (least, most) = cast("tuple[tuple[int, int], ...]", image.getextrema())
    is_drawing = least < most and all(high - low <= _ONE_COLOUR for low, high in colours)
    if background is None and not is_drawing:
        return image.convert("RGB")
    if background is None and light_ink:
        return image.getchannel("A")
    red, green, blue = ((low + high) / 2 for low, high in colours)
    ink = 0.299 * red + 0.587 * green + 0.114 * blue
    paper = background or ("white" if ink < 128 else "black")
    if is_drawing and abs(ink - (255 if paper == "white" else 0)) <= _ONE_COLOUR:
        raise UnfitItem(f"the drawing stands in alpha alone and has the colour of its background, {paper}")
    return Image.alpha_composite(Image.new("RGBA", image.size, paper), image).convert("RGB")


def check_resize(image: Image.Image, short_side: int, max_pixels: int) -> None:
    """Refuse an image so long and thin that resizing its short side would blow it up.

    Raises:
        ItemError: where the resized image would exceed max_pixels.
    """
    long, short = max(image.size), min(image.size)
    if long * short_side / short * short_side > max_pixels:
        raise TooLargeItem(f"an image of {image.width}x{image.height} pixels is too long and thin to resize")


def decode_base64(text: str, what: str) -> bytes:
    """Decode base64 or refuse with a 400 that names `what`.

    Args:
        text: In the standard or the url-safe alphabet; with or without padding, line breaks or a `data:` prefix.
        what: What errors call it.
    """
    start = text[:_LONGEST_PREFIX].lower().rfind(_PREFIX_ENDS)
    tail = text if start < 0 else text[start + len(_PREFIX_ENDS) :]
    if start >= 0 and "%" in tail:  # data: is an URL
        tail = unquote(tail)
    # Lines, not words: what has spaces between is a text.
    joined = "".join(line.strip() for line in tail.splitlines())
    letters = joined.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UnreadableItem(f"{what}: expected base64") from None
