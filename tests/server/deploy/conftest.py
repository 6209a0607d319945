"""One TorchServe for all that stands before it or watches it: two members for digits, and a handler that echoes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from archiver.__main__ import main as archive
from scripts.private_torchserve import TorchServe
from tests.server.conftest import write_archive
from vmap_ensemble.models.mnist import MnistNet

ECHO_HANDLER = '''\
"""Answers a request's headers, by names in small letters."""

import json


def handle(data, context):
    if data is None:
        return None
    headers = [context.get_all_request_header(i) for i in range(len(data))]
    return [json.dumps({key.lower(): own for key, own in row.items() if isinstance(own, str)}) for row in headers]
'''


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("deployed")
    for name in "ab":
        torch.manual_seed(ord(name))
        torch.save(MnistNet().state_dict(), folder / f"{name}.pt")
    members = [str(folder / f"{name}.pt") for name in "ab"]
    settings = ["--set", "execution=eager", "--set", "abstain_below_probability=0.99"]
    assert archive(["mnist_ens", "--members", *members, "--output", str(folder), "--no-check", *settings]) == 0
    archives = {"ens": folder / "mnist_ens.mar", "echo": write_archive(folder, "echo", ECHO_HANDLER)}
    with TorchServe(archives) as running:
        yield running
