"""Turns a seed into requests that must be refused, each with the statuses that it may get, and into good ones.

All of it is harmless: malformed JSON, wrong types and shapes, cut-off files, wrong encodings, unknown options, limits
that are passed by a little. What a client may get wrong, not what would break a library.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

# Limits that the archives under test set, small enough to be passed cheaply.
MAX_PIXELS = 10_000
MAX_CHARACTERS = 2_000
MAX_REQUEST_TOKENS = 400
MAX_EXPLANATIONS = 3
MAX_ITEMS = 1024
JSON = {"Content-Type": "application/json"}
# What the tiny tokenizer knows, and other words.
TEXT = "a sample text what is it ? the goal of life to be sarah lives in new york . great bad movie zebra"
WORDS = TEXT.split()
NOT_OBJECTS: tuple[Any, ...] = (None, True, False, 0, -1, 1.5)


@dataclass(frozen=True)
class Sent:
    """One request as httpx takes it, and what it may be answered with; `kind` is for messages."""

    kind: str
    statuses: tuple[int, ...]
    request: dict[str, Any] = field(repr=False)

    @property
    def is_good(self) -> bool:
        return self.statuses == (200,)


# Statuses that are right, and the request.
Made = tuple[tuple[int, ...], dict[str, Any]]
Maker = Callable[[random.Random], Made]
Item = Callable[[random.Random], Any]


def as_json(body: Any, **headers: str) -> dict[str, Any]:
    """JSON as Python writes it: NaN and Infinity stay, as many clients send them."""
    return {"content": json.dumps(body).encode("utf-8", "surrogatepass"), "headers": {**JSON, **headers}}


def raw_json(text: str | bytes) -> dict[str, Any]:
    return {"content": text if isinstance(text, bytes) else text.encode(), "headers": JSON}


# --- what is wrong with any body ---------------------------------------------------------------------------------


def broken_json(rng: random.Random, item: Item) -> Made:
    text = json.dumps(item(rng))
    cut = text[: rng.randrange(1, len(text))]
    broken = (
        cut if cut[-1] not in "0123456789" or text[0] == "{" else "{",
        text + rng.choice(["}", "]", ",", " x", "\x00"]),
        text.replace('"', "'") if '"' in text else "{'a': 1}",
        "{" + text,
        text[:-1] + ",}" if text[0] == "{" else text + "]",
        "// a comment\n" + text,
        "{text: 1}",
        '{"data": 0x10}',
        '{"data": 1' + "0" * 5000 + "}",
        "{" * rng.randrange(2, 3000),
        '{"a":' * rng.randrange(2, 3000),
    )
    return (400,), raw_json(rng.choice(broken))


def wrong_encoding(rng: random.Random) -> Made:
    """Claims to be JSON and is bytes of something else."""
    text = '{"text": "größe", "data": "größe"}'
    return (400,), raw_json(rng.choice([text.encode("latin-1"), b"\xff\xfe\x00", b"\xef\xbb\xbf", rng.randbytes(40)]))


def not_an_item(rng: random.Random) -> Made:
    body = rng.choice([*NOT_OBJECTS, {}, [], [None], [True], {"": 1}, {"no": "key"}, [{}], [[]], {"id": "x"}])
    return (400, 422), as_json(body)


def empty(rng: random.Random) -> Made:
    kind = rng.choice(["application/json", "text/plain", "image/png", "application/octet-stream", "", "a/b; c=d"])
    return (400,), {"content": b"", "headers": {"Content-Type": kind} if kind else {}}


def form(rng: random.Random) -> Made:
    fields = rng.choice([{"data": "a movie"}, {"a movie": ""}, {"subset": "m0"}, {"text": "x", "top_k": "1"}])
    return (400,), {"data": fields}


def deep(rng: random.Random) -> Made:
    depth = rng.choice([20, 65, 200, 900, 3000])
    inner = rng.choice(["1", '"a"', "null", ""])
    lists = "[" * depth + inner + "]" * depth
    body = rng.choice([lists, f'{{"data": {lists}}}', f'{{"instances": [{lists}]}}', f'{{"text": {lists}}}'])
    return (400, 422), raw_json(body)


WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, 1.5, "x", True, [], {}, "1e3", "9" * 12, -(10**30), "½"),
    "detail": ("all", 3, [], {}, "Members", "x" * 5000),
    "subset": ([], "", " , ", 5, [1], ["nobody"], {"m0": 1}, "nobody", ["m0", None], "m0;m1", "ß" * 3000, True),
    "target": (True, {}, [], [None], 1.5, "", [[0]]),
}


def wrong_option(rng: random.Random, item: Item) -> Made:
    """In the body, in an item, in KServe's parameters."""
    key = rng.choice(list(WRONG_OPTIONS))
    wrong = {key: rng.choice(WRONG_OPTIONS[key])}
    good = item(rng)
    return (400, 422), as_json(
        rng.choice(
            [
                {**good, **wrong},
                {"instances": [good], **wrong},
                {"instances": [good, {**good, **wrong}]},
                {"instances": [good], "parameters": wrong},
                [{**good, **wrong}],
            ]
        )
    )


def wrong_header(rng: random.Random, item: Item) -> Made:
    headers = (
        ("X-Ensemble-Top-K", ("0", "-1", "x", "1.5", "9" * 12)),
        ("x-ensemble-subset", ("nobody", "m0,nobody", ",", "m0 m1", "x" * 4000)),
        ("X-ENSEMBLE-DETAIL", ("all", "1", "members,")),
        ("X-Ensemble-Target", (",", ",,,")),
        ("X-Ensemble-Subsets", ("m0", "")),
    )
    name, values = rng.choice(headers)
    return (400, 422), as_json(item(rng), **{name: rng.choice(values)})


def unknown_key(rng: random.Random, item: Item) -> Made:
    key = rng.choice(
        ["subsets", "member", "topk", "top-k", "Detail", "labels", "ключ", "x" * 5000, "__class__", "🙂"]
    )
    good = item(rng)
    wrong = {key: rng.choice([1, "m0", None, [], {"a": 1}])}
    bodies = [
        {**good, **wrong},
        {"instances": [{**good, **wrong}]},
        {"instances": [good], **wrong},
        [{**good, **wrong}],
    ]
    return (400,), as_json(rng.choice(bodies))


def wrong_v1(rng: random.Random, item: Item) -> Made:
    good = item(rng)
    wrong = rng.choice([None, True, 3, {}, [], {"data": None}, {"text": 5}])
    bodies = (
        {"instances": []},
        {"instances": None},
        {"instances": good},
        {"instances": "text"},
        {"instances": [wrong]},
        {"instances": [good, wrong, good]},
        {"instances": [[good]]},
        {"instances": [good], "id": "i" * 300},
        {"instances": [good], "inputs": []},
        {"instances": [good], "parameters": rng.choice(["subset=m0", [{"subset": "m0"}], 1])},
    )
    return (400, 415, 422), as_json(rng.choice(bodies))


def too_many_items(rng: random.Random) -> Made:
    count = MAX_ITEMS + rng.randrange(1, 100)
    return (413,), as_json(rng.choice([{"instances": ["a"] * count}, ["a"] * count]))


def wrong_v2(rng: random.Random) -> Made:
    tensor: dict[str, Any] = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
    changes: tuple[dict[str, Any], ...] = (
        {"shape": rng.choice([[2, 2], [3], [-1, 2], [0], [1.5], "2", [2**62, 2], [1] * 40, [True], [[1]], {}])},
        {"datatype": rng.choice(["FP128", 5, None, [], "x" * 3000, "fp32", "BYTES", "BOOL", "UINT8", "ß"])},
        {"data": rng.choice([None, 1, "ab", {}, [1], [1, [2]], [[1], [2, 3]], ["a", "b"], [None, 1], [], [[[]]]])},
        {"name": rng.choice([1, None, [], {}, "n" * 5000])},
        rng.choice([{"subset": ["m0"]}, {"parameters": {"subset": "m0"}}, {"parameters": {"top-k": 1}}]),
        {"parameters": {"content_type": rng.choice(["base64", "pickle", "x" * 2000, 7, "str"])}},
    )
    wrong = {**tensor, **rng.choice(changes)}
    bodies = (
        {"inputs": [wrong]},
        {"inputs": [tensor, wrong]},
        {"inputs": [tensor, tensor]},
        {"inputs": [{**tensor, "name": f"n{i}"} for i in range(65)]},
        {"inputs": [wrong], "id": "i" * 300},
        {"inputs": tensor},
        {"inputs": [tensor, 1]},
        {"inputs": [{key: value for key, value in tensor.items() if key != "data"}]},
        {"inputs": [wrong], "surplus": 1},
        {"inputs": []},
    )
    return (400, 413, 415, 422), as_json(rng.choice(bodies))


def cut_multipart(rng: random.Random) -> dict[str, Any]:
    """Its only part, an option, without an end; nothing where parts should be; another boundary than it says."""
    part = b'--xx\r\nContent-Disposition: form-data; name="subset"\r\n\r\nm0'
    kind = f"multipart/form-data; boundary={rng.choice(['xx', 'yy'])}"
    return {"content": rng.choice([part, part[:20], b"--xx--\r\n", b"nothing"]), "headers": {"Content-Type": kind}}


def wrong_multipart(rng: random.Random, file: Callable[[random.Random], bytes]) -> Made:
    body = file(rng)
    names = rng.choice([("data", "data"), ("data", "body"), ("image", "image"), ("a", "b"), ("text", "text")])
    makers: tuple[dict[str, Any], ...] = (
        {"files": [(name, ("f", body)) for name in names]},
        {"files": {"data": ("f", body)}, "data": {rng.choice(["subsets", "topk", "member", "größe"]): "1"}},
        {"files": {"data": ("f", body)}, "data": {"top_k": rng.choice(["0", "-3", "many", "1.5"])}},
        {"files": {"data": ("f", body)}, "data": {"subset": rng.choice(["nobody", ",", "m0,nobody"])}},
        {"files": {"data": ("f", body)}, "data": {"detail": "everything"}},
        {"files": {"data": ("f", b"")}},
        {"files": {"subset": (None, "m0")}},
        {"files": {"data": ("f.json", b"{", "application/json")}},
        {"files": {"data": ("f.json", b"\xff", "application/json")}},
        cut_multipart(rng),
    )
    return (400, 413, 415, 422), rng.choice(makers)


def common(item: Item, file: Callable[[random.Random], bytes]) -> list[Maker]:
    """What every handler refuses.

    Args:
        item: A good item as an object of JSON.
        file: A good body.
    """
    return [
        partial(broken_json, item=item),
        wrong_encoding,
        not_an_item,
        empty,
        form,
        deep,
        partial(wrong_option, item=item),
        partial(wrong_header, item=item),
        partial(unknown_key, item=item),
        partial(wrong_v1, item=item),
        too_many_items,
        wrong_v2,
        partial(wrong_multipart, file=file),
    ]


# --- images ------------------------------------------------------------------------------------------------------


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


# --- texts -------------------------------------------------------------------------------------------------------


def words(rng: random.Random, most: int = 20) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))


def text_item(rng: random.Random) -> dict[str, Any]:
    return {"text": words(rng)}


def question_item(rng: random.Random) -> dict[str, Any]:
    return {"question": words(rng, 6), "context": words(rng)}


def mask_item(rng: random.Random) -> dict[str, Any]:
    return {"text": f"{words(rng)} [MASK] {words(rng)}"}


WRONG_TEXTS = (
    "",
    " \n\t",
    "a\x00b",
    "\ud800",
    "a \udfff b",
    None,
    1,
    1.5,
    True,
    [],
    {},
    ["a"],
    {"text": "a"},
    float("nan"),
)


def wrong_text(rng: random.Random, item: Item) -> Made:
    """One of a good item's texts replaced."""
    good = item(rng)
    key = rng.choice(list(good))
    wrong = {**good, key: rng.choice(WRONG_TEXTS)}
    return (400, 422), as_json(
        rng.choice([wrong, {"instances": [wrong]}, {"instances": [good, wrong]}, [good, wrong]])
    )


def wrong_bytes(rng: random.Random) -> Made:
    body = rng.choice(
        [b"\xff\xfe", "größe".encode("latin-1"), "größe".encode("utf-16"), b"a\x00b", b"  \n", b"\xed\xa0\x80"]
    )
    return (400,), {
        "content": body,
        "headers": {"Content-Type": rng.choice(["text/plain", "application/octet-stream"])},
    }


def long_text(rng: random.Random, item: Item) -> Made:
    good = item(rng)
    key = rng.choice(list(good))
    long = rng.choice(["x", "a ", "größe ", "🙂"]) * (MAX_CHARACTERS + 1)
    return (413,), as_json(rng.choice([{**good, key: long}, {"instances": [good, {**good, key: long}]}]))


def many_tokens(rng: random.Random, item: Item) -> Made:
    body = [item(rng) for _ in range(MAX_REQUEST_TOKENS // 3 + 1)]
    return (413,), as_json(rng.choice([{"instances": body}, body]))


def without_a_key(rng: random.Random, item: Item) -> Made:
    good = item(rng)
    good.pop(rng.choice(list(good)))
    good.update(rng.choice([{}, {"txt": "a"}, {"contexts": "a"}, {"text_pair": "a"}]))
    if rng.random() < 0.2:
        good = {**item(rng), "data": "a text too many"}
    return (400,), as_json(rng.choice([good, {"instances": [good]}, [good]]))


def _file(rng: random.Random, item: Item) -> bytes:
    return json.dumps(item(rng)).encode()


def text_makers(item: Item) -> list[Maker]:
    """What a handler of texts refuses; `item` makes a good one."""
    return [
        *common(item, partial(_file, item=item)),
        partial(wrong_text, item=item),
        partial(wrong_text, item=item),
        wrong_bytes,
        partial(long_text, item=item),
        partial(many_tokens, item=item),
        partial(without_a_key, item=item),
    ]


def good_texts(rng: random.Random, item: Item, count: int) -> list[Sent]:
    """Every way to send one."""
    sent = []
    for index in range(count):
        own = item(rng)
        columns = [
            {"name": key, "shape": [2], "datatype": "BYTES", "data": [value, value]} for key, value in own.items()
        ]
        ways: tuple[dict[str, Any], ...] = (
            as_json(own),
            as_json({**own, "subset": "m1", "detail": "members"}),
            as_json({"instances": [own, {**item(rng), "subset": ["m0"]}]}),
            as_json([own, item(rng)]),
            as_json({"id": "7", "inputs": columns}),
            as_json(own, **{"X-Ensemble-Top-K": "1"}),
            {"content": json.dumps(own).encode()},
        )
        sent.append(Sent("good", (200,), ways[index % len(ways)]))
    return sent


# --- explanations ------------------------------------------------------------------------------------------------


def wrong_target(rng: random.Random, item: Item) -> Made:
    wrong = rng.choice(["nobody", 99, -1, ["LABEL_0", "x"], "LABEL_0,x", "9" * 30, "ß" * 4000])
    return (422,), as_json({**item(rng), "target": wrong})


def many_explanations(rng: random.Random, item: Item) -> Made:
    many = [item(rng) for _ in range(MAX_EXPLANATIONS + 1)]
    return (413,), as_json(rng.choice([many, {"instances": many}, {"instances": many[:2], "target": [0, 1]}]))


def explanation_makers(item: Item) -> list[Maker]:
    """What an explanation of a text is refused for."""
    return [*text_makers(item), partial(wrong_target, item=item), partial(many_explanations, item=item)]


def make_bad(rng: random.Random, makers: Sequence[Maker], count: int) -> list[Sent]:
    """So many bad requests, each kind as often as the others."""
    sent = []
    for index in range(count):
        maker = makers[index % len(makers)]
        statuses, request = maker(rng)
        name = getattr(maker, "func", maker).__name__
        sent.append(Sent(f"{name}[{index}]", statuses, request))
    return sent
