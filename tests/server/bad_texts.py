"""Turns a seed into requests that a handler of texts must refuse, and into good ones."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import Any

from tests.server.bad_inputs import (
    MAX_CHARACTERS,
    MAX_EXPLANATIONS,
    MAX_REQUEST_TOKENS,
    WORDS,
    Item,
    Made,
    Maker,
    Sent,
    as_json,
    common,
)


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


def wrong_target(rng: random.Random, item: Item) -> Made:
    wrong = rng.choice(["nobody", 99, -1, ["LABEL_0", "x"], "LABEL_0,x", "9" * 30, "ß" * 4000])
    return (422,), as_json({**item(rng), "target": wrong})


def many_explanations(rng: random.Random, item: Item) -> Made:
    many = [item(rng) for _ in range(MAX_EXPLANATIONS + 1)]
    return (413,), as_json(rng.choice([many, {"instances": many}, {"instances": many[:2], "target": [0, 1]}]))


def explanation_makers(item: Item) -> list[Maker]:
    """What an explanation of a text is refused for."""
    return [*text_makers(item), partial(wrong_target, item=item), partial(many_explanations, item=item)]
