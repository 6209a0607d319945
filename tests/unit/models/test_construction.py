"""A class of one's own gives the same numbers whenever it is built, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.models.construction import check_construction

HEAD = """import random
import numpy as np
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
"""
TAIL = "        self.fc = nn.Linear(3, num_classes)\n"


def write(folder: Path, *lines: str, after: tuple[str, ...] = ()) -> str:
    body = "".join(f"        {line}\n" for line in lines) + TAIL + "".join(f"        {line}\n" for line in after)
    (folder / "model.py").write_text(HEAD + body)
    return "model.py"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("self.register_buffer('proj', torch.randn(4), persistent=False)", "proj"),
        ("self.order = torch.randperm(40)", "order"),
        ("self.order = np.random.permutation(40)", "order"),
        ("self.order = random.sample(range(40), 40)", "order"),
        ("self.scale = {'a': [torch.rand(3)]}", "scale"),
        ("self.inner = nn.Linear(2, 2); self.inner.noise = torch.rand(3)", "inner.noise"),
        ("l = nn.Linear(2, 2); self.register_buffer('copy', l.weight.detach().clone(), persistent=False)", "copy"),
    ],
)
def test_what_is_drawn_beside_the_weights_is_refused(tmp_path: Path, line: str, name: str) -> None:
    spec = write(tmp_path, line)
    with pytest.raises(SettingsError, match=f"'{name}' is drawn at random and is in no checkpoint"):
        check_construction(spec, None, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "self.register_buffer('proj', torch.randn(4))",
        "self.register_buffer('table', torch.arange(4), persistent=False)",
        "self.order = list(range(4)); self.name = str(id(self)); self.rate = 0.1",
        "torch.manual_seed(3); self.order = torch.randperm(40)",
        "np.random.seed(3); self.order = np.random.permutation(40)",
    ],
)
def test_what_is_the_same_every_time_is_fine(tmp_path: Path, line: str) -> None:
    check_construction(write(tmp_path, line), 4, tmp_path)


def test_random_numbers_go_on_as_before(tmp_path: Path) -> None:
    spec = write(tmp_path, "self.table = torch.arange(4)")
    torch.manual_seed(0)
    np.random.seed(0)
    expected = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    check_construction(spec, None, tmp_path)
    assert (torch.rand(1).item(), np.random.rand()) == expected


@pytest.mark.parametrize(
    "last",
    [
        "self.order = torch.randperm(40)",
        "self.register_buffer('proj', torch.randn(40), persistent=False)",
        "self.register_buffer('copy', self.fc.weight.detach().clone(), persistent=False)",
    ],
)
def test_a_seed_of_its_own_gives_what_plain_torch_gives(tmp_path: Path, last: str) -> None:
    spec = write(tmp_path, "torch.manual_seed(7)", after=(last,))
    space: dict = {}
    exec((tmp_path / "model.py").read_text(), space)
    name = last.split("'")[1] if "'" in last else "order"
    check_construction(spec, None, tmp_path)
    assert torch.equal(getattr(build_architecture(spec, None, tmp_path), name), getattr(space["Net"](), name))
