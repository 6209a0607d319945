"""The handler of docs/own_handler.md, extracted and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn


def test_handler_of_the_page(make_archive, make_context, ask):
    page = Path("docs/own_handler.md").read_text(encoding="utf-8")
    space: dict = {"__name__": "own_handler"}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], space)
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
