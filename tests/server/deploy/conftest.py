"""One TorchServe for all that stands before it or watches it: members for digits, and a handler that echoes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from archiver.__main__ import main as archive
from scripts.private_torchserve import TorchServe
from tests.server.conftest import write_archive

ECHO_HANDLER = '''\
"""Answers a request's headers, by names in small letters."""

import json


def handle(data, context):
    if data is None:
        return None
    headers = [context.get_all_request_header(i) for i in range(len(data))]
    return [json.dumps({key.lower(): own for key, own in row.items() if isinstance(own, str)}) for row in headers]
'''


# Rows of its batches depend on each other, so that they are run alone: a way that is slower than was meant.
NEIGHBOURS = """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y + y.mean(0)
"""


def write_members(folder: Path) -> list[str]:
    """Three members; the last one gives no finite numbers."""
    paths = []
    for name in "abc":
        torch.manual_seed(ord(name))
        state = torch.nn.Linear(784, 10).state_dict(prefix="linear.")
        if name == "c":
            state["linear.bias"][0] = math.nan
        paths.append(str(folder / f"{name}.pt"))
        torch.save(state, paths[-1])
    return paths


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "model.py").write_text(NEIGHBOURS)
    settings = ["execution=eager", "architecture=model.py:Net", "abstain_below_probability=0.99"]
    command = ["mnist_ens", "--members", *write_members(folder), "--model-file", str(folder / "model.py")]
    assert archive([*command, "--output", str(folder), "--no-check", "--allow-nan", "--set", *settings]) == 0
    archives = {"ens": folder / "mnist_ens.mar", "echo": write_archive(folder, "echo", ECHO_HANDLER)}
    with TorchServe(archives) as running:
        yield running
