"""On a machine that the kernels aren't compiled for each of them says so, and a network is served without them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from archiver.packing.kernels import add_kernels
from vmap_ensemble import stack_members
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cpu import kernel_library, single_row, winograd
from vmap_ensemble.execution.cpu.encoder_layers import LayerForm
from vmap_ensemble.execution.cpu.layers import ConvolutionLayer
from vmap_ensemble.execution.graph.patterns import ConvolveSettings


@pytest.fixture(autouse=True, params=[("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")], ids=" ".join)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    system, kind = request.param
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: kind)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("a compiler was started"))
    kernel_library.load_library.cache_clear()
    yield
    kernel_library.load_library.cache_clear()


def test_every_kernel_refuses_with_its_reason() -> None:
    plain, size = ConvolveSettings([1, 1], [1, 1], [1, 1], 1), (1, 64, 56, 56)
    layer = ConvolutionLayer(torch.float32, (64, 64, 3, 3), plain, "relu", size, size)
    assert kernel_library.instruction_set() is None
    assert kernel_library.library_name() is None
    assert winograd.reasons_against(layer) == ["no kernel here"]
    assert single_row.reasons_against(torch.ones(2, 64, 64)) == ["no kernel here"]
    assert LayerForm(64, 64, 4, "gelu", 1e-5, 0.25).reasons_against() == ["no kernel here"]


def test_an_archive_says_what_its_kernels_are_for(tmp_path) -> None:
    assert add_kernels(tmp_path) == "they are for Linux on x86-64 CPUs"
    assert list(tmp_path.iterdir()) == []


@torch.inference_mode()
def test_a_network_that_would_use_them_is_served_without() -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 64)).eval()

    members = stack_members({f"m{index}": make().state_dict() for index in range(2)})
    forward, x = EnsembleForward(make(), members), torch.randn(1, 64, 6, 6)
    run = build_execution("prepared", forward, [(x,)])
    torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-4, atol=1e-5)
    assert "no kernel here" in run.run.reason
