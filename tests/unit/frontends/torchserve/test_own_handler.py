"""The handler of docs/own_handler.md, extracted and run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture
def space() -> dict:
    """What the page's blocks define, run one after another."""
    page = Path("docs/own_handler.md").read_text(encoding="utf-8")
    found: dict = {"__name__": "own_handler"}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, found)
    return found


def test_handler_of_the_page(space, make_archive, make_context, ask):
    models = {}
    for seed in range(3):
        torch.manual_seed(seed)
        models[f"m{seed}"] = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    handler = space["HousePriceHandler"]()
    handler.initialize(make_context(make_archive({k: m.state_dict() for k, m in models.items()})))
    good, bad, some = ask(
        handler,
        [
            {"body": {"rooms": 3, "area_m2": 70}},
            {"body": {"rooms": "x"}},
            {"body": {"rooms": 3, "area_m2": 70, "subset": ["m1"]}},
        ],
    )
    with torch.inference_mode():
        prices = torch.cat([m(torch.tensor([3.0, 70.0])) for m in models.values()])
    assert good[1]["price"] == pytest.approx(prices.mean().item(), rel=1e-4)
    assert good[1]["spread"] == pytest.approx(prices.std(correction=0).item(), rel=1e-4)
    assert bad[0] == 422
    assert some[1]["price"] == pytest.approx(prices[1].item(), rel=1e-4)


def test_pictures_prepared_in_ones_own_way(space, make_archive, make_context, ask, image_file):
    class Thumbnails(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(256, 3))

    members = {}
    for seed in range(2):
        torch.manual_seed(seed)
        members[f"m{seed}"] = Thumbnails()
    handler_class = type("H", (space["ThumbnailHandler"],), {"build_model": lambda self: Thumbnails().eval()})
    handler = handler_class()
    handler.initialize(make_context(make_archive({k: m.state_dict() for k, m in members.items()})))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    ((status, body),) = ask(handler, [{"body": image_file(pixels)}])
    small = np.asarray(Image.fromarray(pixels).resize((16, 16)), dtype=np.float32) / 127.5 - 1
    with torch.inference_mode():
        own = torch.stack([m(torch.from_numpy(small)[None, None]) for m in members.values()]).softmax(-1).mean(0)[0]
    assert status == 200
    assert body["prediction"]["index"] == int(own.argmax())
    assert body["prediction"]["probability"] == pytest.approx(own.max().item(), abs=1e-5)


def test_two_inputs(space, make_archive, make_context, ask):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, features, row):
            return self.left(features) + self.right(row)

    members = {}
    for seed in range(2):
        torch.manual_seed(seed)
        members[f"m{seed}"] = Pair()
    handler_class = type("H", (space["PairHandler"],), {"build_model": lambda self: Pair().eval()})
    handler = handler_class()
    handler.initialize(make_context(make_archive({k: m.state_dict() for k, m in members.items()})))
    bodies = [{"features": [1, 2, 3, 4], "row": [5, 6]}, {"features": [1], "row": [2]}, {"row": [1, 2]}]
    good, wrong, missing = ask(handler, [{"body": body} for body in bodies])
    with torch.inference_mode():
        args = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[5.0, 6]])
        own = torch.stack([m(*args) for m in members.values()]).softmax(-1).mean(0)[0]
    assert good[1]["prediction"]["probability"] == pytest.approx(own.max().item(), abs=1e-5)
    assert [wrong[0], missing[0]] == [422, 422]
