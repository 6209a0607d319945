"""A tiny archive of three members that have learnt three kinds of pictures, for every tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from optimise.gate import judge
from tests.conftest import write_archive

MODEL = """
from torch import nn
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(36, 3)
    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().flatten(1)))
"""
HANDLER = """
from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler
from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser
from vmap_ensemble.tasks.images.task import ImageTask
class TinyHandler(ImageTask, VmapEnsembleHandler):
    mode, short_side, default_input_shape = "L", 8, (1, 8, 8)
    def transform(self, image, row):
        PixelNormaliser((0.5,), (0.5,)).write(image.resize((8, 8)), row)
"""
NAMES = ("bar", "blob", "dot")


def draw(label: int, random: np.random.Generator) -> np.ndarray:
    """An 8x8 picture of one of three kinds, noisy enough that members differ."""
    image = random.normal(60, 45, (8, 8))
    row, column = random.integers(0, 5, 2)
    if label == 0:
        image[row] += 120
    elif label == 1:
        image[row : row + 4, column : column + 4] += 90
    else:
        image[row, column] += 190
    return image.clip(0, 255).astype(np.uint8)


def batch_of(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = torch.arange(count) % 3
    images = np.stack([draw(int(label), random) for label in labels])
    return (torch.from_numpy(images).float()[:, None] / 255 - 0.5) / 0.5, labels


def tiny() -> nn.Module:
    space: dict = {"__name__": "tiny"}
    exec(MODEL, space)
    return space["Tiny"]()


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "ROUNDS", 3)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members that have learnt the three kinds a little, each from its own examples."""
    states = {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = tiny()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        x, y = batch_of(240, seed)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        states[f"m{seed}"] = model.eval().state_dict()
    settings = {"handler": "tiny_handler.py", "architecture": "model.py:Tiny", "num_classes": 3}
    folder = write_archive(tmp_path_factory.mktemp("distil") / "ens", states, settings)
    (folder / "model.py").write_text(MODEL)
    (folder / "tiny_handler.py").write_text(HANDLER)
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(9)
    for index in range(240):
        own = folder / NAMES[index % 3]
        own.mkdir(exist_ok=True)
        Image.fromarray(draw(index % 3, random)).save(own / f"{index}.png")
    return folder
