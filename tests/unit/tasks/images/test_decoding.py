"""Decoding against torchvision's own loader and Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.datasets.folder import pil_loader

from vmap_ensemble.errors import ItemError
from vmap_ensemble.serving.statuses import status_of
from vmap_ensemble.tasks.images.decoding import check_resize, decode_image, read_item

LIMIT = 1_000_000


def sample(mode="RGB", size=(31, 17)):
    rng = np.random.default_rng(0)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


FILES = {
    "jpeg": (sample(), "JPEG", {}),
    "png": (sample(), "PNG", {}),
    "webp": (sample(), "WEBP", {}),
    "grey": (sample("L"), "PNG", {}),
    "palette": (sample().quantize(16), "PNG", {}),
    "alpha": (sample("RGBA"), "PNG", {}),
    "grey alpha": (sample("LA"), "PNG", {}),
    "cmyk": (sample("CMYK"), "JPEG", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_torchvisions_loader(name, image_file, tmp_path):
    image, kind, options = FILES[name]
    data = image_file(image, kind, **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    assert np.array_equal(np.asarray(decode_image(data, "RGB", LIMIT)), np.asarray(pil_loader(str(path))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, image_file):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(sample(), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    ours = decode_image(data, "RGB", LIMIT)
    assert ours.size == ((31, 17) if orientation < 5 else (17, 31))
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_16_bit_grey_is_scaled(image_file):
    values = np.array([[0, 256, 65535]], dtype=np.uint16)
    assert np.asarray(decode_image(image_file(Image.fromarray(values)), "L", LIMIT)).tolist() == [[0, 1, 255]]


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [1001, 12_000, 20_000, 2_000_000])
def test_too_many_pixels_are_refused_before_decoding(side):
    with pytest.raises(ItemError, match="pixels") as caught:
        decode_image(png_header(side, side), "RGB", LIMIT)
    assert status_of(caught.value) == 413


def test_single_pixel(image_file):
    assert decode_image(image_file([[7]]), "L", LIMIT).getpixel((0, 0)) == 7


@pytest.mark.parametrize(("data", "status"), [(b"hello", 415), (b"", 415), (b"%!PS-Adobe-3.0 EPSF", 415)])
def test_no_image(data, status):
    with pytest.raises(ItemError, match="not an image") as caught:
        decode_image(data, "RGB", LIMIT)
    assert status_of(caught.value) == status


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_or_spoilt_files_are_refused_or_read(kind, image_file):
    data = image_file(sample(), kind)
    rng = np.random.default_rng(0)
    with pytest.raises(ItemError) as caught:
        decode_image(data[: len(data) // 2], "RGB", LIMIT)
    assert status_of(caught.value) in (400, 415)
    for _ in range(60):
        spoilt = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            spoilt[position] = rng.integers(0, 256)
        try:
            decode_image(bytes(spoilt), "RGB", LIMIT)
        except ItemError as error:
            assert status_of(error) in (400, 413, 415)  # noqa: PT017 - a spoilt file may as well be read


def test_long_thin_image_is_not_resized():
    with pytest.raises(ItemError, match="1x100000 pixels is too long and thin") as caught:
        check_resize(Image.new("L", (1, 100_000)), 256, 50_000_000)
    assert status_of(caught.value) == 413
    check_resize(Image.new("L", (500, 400)), 256, 50_000_000)


def drawing(side):
    """Smooth colours with edges, as a photo has; not noise, which no decoder is made for."""
    y, x = np.mgrid[0:side, 0:side] / side
    pixels = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(9 * x * y)], -1)
    pixels[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.04] = (250, 240, 20)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("short_side", "side"), [(None, 800), (800, 800), (401, 800), (400, 400), (150, 200), (1, 100)]
)
def test_jpeg_is_decoded_at_the_smallest_scale_that_is_large_enough(short_side, side, image_file):
    ours = decode_image(image_file(drawing(800), "JPEG", quality=95), "RGB", LIMIT, short_side)
    assert ours.size == (side, side)


def test_scaled_decoding_comes_close_to_resizing(image_file):
    data = image_file(drawing(800), "JPEG", quality=95)
    whole, scaled = (
        np.asarray(
            decode_image(data, "RGB", LIMIT, short_side).resize((100, 100), Image.Resampling.BILINEAR), dtype=int
        )
        for short_side in (None, 200)
    )
    difference = np.abs(whole - scaled)
    assert 0 < difference.max() <= 8
    assert difference.mean() < 0.5


def test_scaled_decoding_concerns_jpeg_alone_and_no_limit(image_file):
    data = image_file(drawing(800))
    assert np.array_equal(decode_image(data, "RGB", LIMIT, 100), decode_image(data, "RGB", LIMIT))
    with pytest.raises(ItemError, match="800x800 pixels; at most 639999"):
        decode_image(image_file(drawing(800), "JPEG"), "RGB", 639_999, 100)


def test_scaled_decoding_turns_images_upright(image_file):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_file(drawing(800).crop((0, 0, 800, 400)), "JPEG", exif=exif)
    assert decode_image(data, "RGB", LIMIT, 100).size == (100, 200)


def test_tensors_keep_their_numbers():
    assert read_item({"data": [[1, 2.5]]}).tolist() == [[1.0, 2.5]]


def test_two_payloads_are_refused():
    with pytest.raises(ItemError, match="with one of data, b64, image"):
        read_item({"data": [1], "b64": "aa"})
