"""Turns a seed into requests that a handler of images must refuse, and into good ones."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tests.server.bad_inputs import Made, Maker, Sent, as_json, common


def picture(rng: random.Random, size: tuple[int, int] = (28, 28), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png(rng: random.Random) -> bytes:
    return encoded(picture(rng))


def base64_item(rng: random.Random) -> dict[str, Any]:
    return {rng.choice(["b64", "data", "image", "base64"]): base64.b64encode(png(rng)).decode()}


def cut_image(rng: random.Random) -> Made:
    file = encoded(picture(rng), rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    part = file[: rng.randrange(1, len(file) * 6 // 10)]
    body = base64.b64encode(part).decode()
    return (400, 415), rng.choice([{"content": part}, {"files": {"data": part}}, as_json({"b64": body})])


def garbled_image(rng: random.Random) -> Made:
    """The first bytes of a format, and noise behind them."""
    begin = rng.choice([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\x00", b"MM\x00*", b"RIFF", b"BM"])
    return (400, 413, 415), {"content": begin + rng.randbytes(rng.randrange(0, 200))}


def another_file(rng: random.Random) -> Made:
    files = (
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"PK\x03\x04",
        b"\x00\x00\x01\x00\x01\x00",
        b"8BPS\x00\x01",
        b"a plain text",
        "ein Text: größe".encode(),
        b"\x80\x04.",
    )
    kind = rng.choice(["image/png", "image/jpeg", "application/octet-stream", "text/plain"])
    return (415,), {"content": rng.choice(files) + b" " * 20, "headers": {"Content-Type": kind}}


def large_image(rng: random.Random) -> Made:
    size = rng.choice([(101, 101), (10_001, 1), (1, 10_001), (2, 3000), (3000, 2)])
    file = encoded(picture(rng, size, "L"), rng.choice(["PNG", "BMP", "TIFF"]))
    return (413,), {"content": file}


def many_pixels(rng: random.Random) -> Made:
    body = base64.b64encode(encoded(picture(rng, (90, 90), "L"))).decode()
    return (413,), as_json({"instances": [{"b64": body}] * 3})


def unknown_white(rng: random.Random) -> Made:
    values = np.random.default_rng(rng.randrange(99)).normal(0, 300, (28, 28))
    kind = rng.choice([np.float32, np.int32])
    return (415,), {"content": encoded(Image.fromarray(values.astype(kind)), "TIFF")}


def wrong_base64(rng: random.Random) -> Made:
    text = base64.b64encode(png(rng)).decode()
    wrong = (text[:41], "@" + text, text[:40] + "ä" + text[40:], "=" * 8, "a text", "data:image/png;base64,", "AAAA")
    value = rng.choice(wrong)
    return (400, 415, 422), as_json(rng.choice([{"b64": value}, {"instances": [{"data": value}]}, {"image": value}]))


def wrong_tensor(rng: random.Random, shape: Sequence[int]) -> Made:
    good = np.random.default_rng(rng.randrange(99)).normal(size=tuple(shape)).round(2)
    odd = good.astype(object)
    odd.flat[rng.randrange(odd.size)] = rng.choice(
        [float("nan"), float("inf"), float("-inf"), 1e39, 10**400, "1", None, {}, [1.0], 1e308]
    )
    wrong = (
        odd.tolist(),
        good[..., :-1].tolist(),
        good[0].tolist(),
        good[None, None].tolist(),
        good.ravel().tolist(),
        [*good.tolist(), 1.0],
        [True, False],
        [[[]]],
        [[1, 2], [3]],
    )
    value = rng.choice(wrong)
    bodies = (
        {"data": value},
        {"instances": [{"data": value}]},
        {"instances": [{"data": good.tolist()}, {"data": value}]},
    )
    return (400, 415, 422), as_json(rng.choice(bodies))


def two_payloads(rng: random.Random) -> Made:
    item = base64_item(rng)
    return (400,), as_json(
        rng.choice([{**item, "b64": "a", "image": "b"}, {"data": {"data": item}}, {"image": {"b64": 1}}])
    )


def image_makers(shape: Sequence[int]) -> list[Maker]:
    """What a handler of images refuses; `shape` is that of its tensors."""
    return [
        *common(base64_item, png),
        cut_image,
        garbled_image,
        another_file,
        large_image,
        many_pixels,
        unknown_white,
        wrong_base64,
        partial(wrong_tensor, shape=shape),
        two_payloads,
    ]


def good_images(rng: random.Random, shape: Sequence[int], count: int) -> list[Sent]:
    """Every way to send one."""
    sent = []
    for index in range(count):
        tensor = np.random.default_rng(index).normal(size=tuple(shape)).round(2).tolist()
        ways: tuple[dict[str, Any], ...] = (
            {"content": png(rng)},
            {"content": encoded(picture(rng, (40, 30)), "JPEG")},
            {"files": {"data": png(rng)}, "data": {"top_k": "2", "detail": "members"}},
            as_json(base64_item(rng)),
            as_json({"data": tensor, "subset": ["m1"]}),
            as_json({"instances": [base64_item(rng), {"data": tensor}]}),
            {"content": png(rng), "headers": {"X-Ensemble-Subset": "m0"}},
            as_json({"inputs": [{"name": "x", "shape": [1, *shape], "datatype": "FP32", "data": [tensor]}]}),
        )
        sent.append(Sent("good", (200,), ways[index % len(ways)]))
    return sent
