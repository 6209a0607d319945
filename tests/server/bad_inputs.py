"""Turns a seed into requests that must be refused, each with the statuses that it may get, and into good ones.

All of it is harmless: malformed JSON, wrong types and shapes, cut-off files, wrong encodings, unknown options, limits
that are passed by a little. What a client may get wrong, not what would break a library.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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


# Statuses that are right, and the request.
Made = tuple[tuple[int, ...], dict[str, Any]]
Maker = Callable[[random.Random], Made]
Item = Callable[[random.Random], Any]


def as_json(body: Any, **headers: str) -> dict[str, Any]:
    """JSON as Python writes it: NaN and Infinity stay, as many clients send them."""
    return {"content": json.dumps(body).encode("utf-8", "surrogatepass"), "headers": {**JSON, **headers}}


def raw_json(text: str | bytes) -> dict[str, Any]:
    return {"content": text if isinstance(text, bytes) else text.encode(), "headers": JSON}


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


def make_bad(rng: random.Random, makers: Sequence[Maker], count: int) -> list[Sent]:
    """So many bad requests, each kind as often as the others."""
    sent = []
    for index in range(count):
        maker = makers[index % len(makers)]
        statuses, request = maker(rng)
        name = getattr(maker, "func", maker).__name__
        sent.append(Sent(f"{name}[{index}]", statuses, request))
    return sent
