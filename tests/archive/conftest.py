"""A small project of its own: model.py, handler, members and setup_config.json."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archiver.__main__ import main

MODEL = """from torch import nn
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.trunk(x).relu())
"""
HANDLER = """from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler
class TinyHandler(VmapEnsembleHandler):
    pass
"""


def tiny_state(seed: int) -> dict[str, Tensor]:
    """The trunk is the same for all seeds, the head is not."""
    torch.manual_seed(0)
    trunk = nn.Linear(3, 4)
    torch.manual_seed(seed + 1)
    head = nn.Linear(4, 2)
    parts = {"trunk": trunk, "head": head}
    return {f"{p}.{key}": value.detach() for p, m in parts.items() for key, value in m.state_dict().items()}


@dataclass
class Project:
    """Runs the archiver in process on a folder of its own."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def mar(self) -> Path:
        return self.store / "tiny.mar"

    def block(self, **changes: Any) -> None:
        block: dict[str, Any] = {
            "handler": "tiny_handler.py",
            "model_file": "model.py",
            "members": ["m*.pt"],
            "input_shape": [3],
        }
        block.update(changes)
        blocks = {"tiny": {key: value for key, value in block.items() if value is not None}}
        (self.folder / "setup_config.json").write_text(json.dumps(blocks))

    def save(self, name: str, state: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return path

    def run(self, *arguments: str, check: bool = False) -> int:
        """Most tests are about what is packed: loading it takes a process of its own, and seconds."""
        config, store = str(self.folder / "setup_config.json"), str(self.store)
        return main([*arguments, *["--no-check"] * (not check), "--config", config, "--output", store])

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.store.iterdir()) if self.store.is_dir() else []

    def unpack(self) -> Path:
        target = self.folder / "unpacked"
        with zipfile.ZipFile(self.mar) as archive:
            archive.extractall(target)
        return target


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "tiny_handler.py").write_text(HANDLER)
    made = Project(tmp_path)
    for seed in range(2):
        made.save(f"m{seed}.pt", tiny_state(seed))
    made.block()
    return made
