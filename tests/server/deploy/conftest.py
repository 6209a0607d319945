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


def build_archive(folder: Path) -> Path:
    """mnist_ens.mar in the folder: answers slowly, abstains always, and one member is left out."""
    model = str(Path(__file__).with_name("linear_model.py"))
    settings = ["execution=eager", "architecture=model.py:Net", "abstain_below_probability=0.99"]
    command = ["mnist_ens", "--members", *write_members(folder), "--model-file", model, "--output", str(folder)]
    assert archive([*command, "--no-check", "--allow-nan", "--set", *settings]) == 0
    return folder / "mnist_ens.mar"


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("deployed")
    archives = {"ens": build_archive(folder), "echo": write_archive(folder, "echo", ECHO_HANDLER)}
    with TorchServe(archives) as running:
        yield running
