"""Decoding against torchvision's own loader and Pillow."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from torchvision.datasets.folder import pil_loader

from vmap_ensemble.errors import ItemError
from vmap_ensemble.serving.statuses import status_of
from vmap_ensemble.tasks.images.decoding import (
    check_resize,
    check_shape,
    count_pixels,
    decode_base64,
    decode_image,
    read_item,
)

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


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff(values, **tags):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo={int(k[1:]): v for k, v in tags.items()})
    return buffer.getvalue()


def decoded(data, mode="L", **options):
    return np.asarray(decode_image(data, mode, LIMIT, **options))


def refused(data, **options):
    with pytest.raises(ItemError) as caught:
        decode_image(data, "L", LIMIT, **options)
    return caught.value


def test_floats_of_zero_to_one_are_scaled():
    assert np.array_equal(decoded(tiff((GREY / 255).astype(np.float32))), GREY)
    assert np.array_equal(decoded(tiff((GREY / 255).astype(np.float32)), "RGB")[..., 1], GREY)
    overshot = (GREY / 255 * 1.003 - 0.0015).astype(np.float32)  # as bicubic resizing leaves them
    assert np.abs(decoded(tiff(overshot)).astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("values", [GREY * 1.0, GREY / 255 - 0.1, GREY * 1000.0, np.where(GREY == 7, np.nan, 0.5)])
def test_floats_without_a_known_white_are_refused(values):
    error = refused(tiff(values.astype(np.float32)))
    assert (status_of(error), "floats beyond 0 to 1" in error.message) == (415, True)


@pytest.mark.parametrize("scale", [1, 257, 2**16 + 1])
def test_wide_integers_are_refused(scale):
    error = refused(tiff(GREY.astype(np.int32) * scale))
    assert (status_of(error), "wide or signed integers" in error.message) == (415, True)


def test_signed_bytes_have_no_known_white():
    """Pillow reads -1 as 255."""
    assert np.array_equal(decoded(tiff(GREY, _339=1)), GREY)
    error = refused(tiff(GREY, _339=2))
    assert status_of(error) == 415
    assert "signed integers" in str(error)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_in_every_file(kind, image_file):
    data = image_file(Image.fromarray(GREY.astype(np.uint16) * 257), kind)
    assert np.array_equal(decoded(data), GREY)
    assert np.array_equal(decoded(data, "RGB")[..., 2], GREY)


def test_big_endian_16_bits_are_scaled(image_file):
    data = image_file(Image.frombytes("I;16B", (16, 16), (GREY.astype(">u2") * 257).tobytes()), "TIFF")
    assert np.array_equal(decoded(data), GREY)


def test_12_bits_are_scaled_by_their_own_white():
    packed = bytearray()
    for first, second in ((0, 4095), (16, 2048)):
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    tags = [(256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (278, 3, 1, 1), (279, 4, 1, len(packed))]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    at = 8 + len(packed)
    data = struct.pack("<2sHI", b"II", 42, at) + packed + struct.pack("<H", len(tags)) + directory + b"\0\0\0\0"
    assert decoded(data).tolist() == [[0, 255, 1, 128]]


@pytest.mark.parametrize("values", [GREY.astype(np.uint16) * 257, (GREY / 255).astype(np.float32)])
def test_tiffs_whose_zero_is_white_are_turned(values):
    data = tiff(values)
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data = data[: at + 8] + struct.pack("<H", 0) + data[at + 10 :]
    assert np.array_equal(decoded(data), 255 - GREY)


def test_scaled_images_are_turned_upright():
    values = np.array([[0.0, 1.0]], dtype=np.float32)
    assert decoded(tiff(values, _274=6)).tolist() == [[0], [255]]
    assert decoded(tiff((values * 65535).astype(np.uint16), _274=6)).tolist() == [[0], [255]]


def canvas(ink, paper=None, kind="RGBA"):
    """A line drawn by alpha: its colour everywhere, its shape in alpha; or on paper of another colour."""
    image = Image.new("RGBA", (20, 20), (*(paper or ink), 0))
    ImageDraw.Draw(image).line([(2, 2), (17, 17)], fill=(*ink, 255), width=4)
    return image.convert(kind)


LINE = np.asarray(canvas((0, 0, 0)).getchannel("A"))


@pytest.mark.parametrize("kind", ["RGBA", "LA"])
def test_drawings_in_alpha_alone_are_laid_on_what_shows_them(kind, image_file):
    black, white = (image_file(canvas(ink, kind=kind)) for ink in ((0, 0, 0), (255, 255, 255)))
    assert np.array_equal(decoded(black), 255 - LINE)
    assert np.array_equal(decoded(white), LINE)
    assert np.array_equal(decoded(black, light_ink=True), LINE)
    assert np.array_equal(decoded(white, light_ink=True), LINE)
    assert np.array_equal(decoded(black, "RGB", light_ink=True)[..., 0], LINE)


def test_a_palette_with_transparent_colours_is_a_drawing_too(image_file):
    image = Image.fromarray((LINE // 255).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 0, 0, 0])
    assert np.array_equal(decoded(image_file(image, transparency=0)), 255 - LINE)


def test_colours_that_show_the_drawing_are_kept_without_alpha(image_file):
    image = canvas((200, 40, 40), (0, 0, 0))
    assert np.array_equal(decoded(image_file(image), "RGB"), np.asarray(image.convert("RGB")))
    opaque = Image.new("RGBA", (4, 4), (7, 7, 7, 255))
    clear = Image.new("RGBA", (4, 4), (7, 7, 7, 0))
    for image in (opaque, clear):
        assert (decoded(image_file(image)) == 7).all()


def test_a_background_is_laid_behind_every_alpha(image_file):
    half = image_file(Image.new("RGBA", (4, 4), (200, 0, 0, 128)))
    for background, value in (("white", [227, 127, 127]), ("black", [100, 0, 0])):
        assert np.abs(decoded(half, "RGB", background=background)[0, 0].astype(int) - value).max() <= 1
    clear = image_file(Image.new("RGBA", (4, 4), (7, 7, 7, 0)))
    assert (decoded(clear, background="white") == 255).all()
    assert np.array_equal(decoded(image_file(canvas((0, 0, 0))), background="white", light_ink=True), 255 - LINE)


def test_a_drawing_of_its_backgrounds_colour_is_refused(image_file):
    error = refused(image_file(canvas((0, 0, 0))), background="black")
    assert (status_of(error), "colour of its background, black" in error.message) == (422, True)


IMAGE = bytes(range(256)) * 3 + b"ab"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(IMAGE).decode(),
        base64.encodebytes(IMAGE).decode(),
        base64.encodebytes(IMAGE).decode().replace("\n", "\r\n"),
        base64.urlsafe_b64encode(IMAGE).decode(),
        base64.b64encode(IMAGE).decode().rstrip("="),
        base64.urlsafe_b64encode(IMAGE).decode().rstrip("="),
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
        "DATA:IMAGE/PNG;charset=utf-8;BASE64, " + base64.b64encode(IMAGE).decode(),
        "data:image/png;base64," + quote(base64.b64encode(IMAGE).decode(), safe=""),
    ],
)
def test_every_form_of_base64_is_read(text):
    assert base64.b64encode(IMAGE).decode().endswith("=")
    for item in (text, {"b64": text}, {"base64": text}, {"data": text}, {"image": text}):
        assert read_item(item) == IMAGE


@pytest.mark.parametrize("text", ["a", "hello", "ä=", "ab*d", "a=bc", "I am no image"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(ItemError, match=r"^image: expected base64$"):
        decode_base64(text, "image")


def test_pixels_are_counted_before_an_image_is_decoded():
    assert count_pixels(png_header(300, 200)) == 60_000
    assert count_pixels(png_header(2_000_000, 2_000_000)) == 0  # decode_image refuses it
    assert count_pixels(b"hello") == 0
    assert count_pixels(read_item({"data": [[1, 2.5, 3]]})) == 3


def test_long_shapes_are_refused_briefly():
    values = [1.0]
    for _ in range(30):
        values = [values]
    with pytest.raises(ItemError, match=r"expected a tensor of shape \[3\], got \[1, 1") as caught:
        check_shape(read_item(values), (3,))
    assert len(caught.value.message) < 200
