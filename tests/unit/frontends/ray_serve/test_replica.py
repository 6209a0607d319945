"""One replica, in this process: what it loads when it is told, and that its health is the model's."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("ray")

from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.frontends.ray_serve import replica
from vmap_ensemble.frontends.ray_serve.replica import Served
from vmap_ensemble.frontends.ray_serve.settings import ModelSettings
from vmap_ensemble.models.mnist import MnistNet


@pytest.fixture
def served(make_archive, make_model, monkeypatch):
    states = {f"m{seed}": make_model(MnistNet, seed).state_dict() for seed in range(2)}
    folder = make_archive(states, {"handler": "mnist_handler.py"})
    monkeypatch.setattr(replica, "_cores", lambda: 1)  # Ray's, where there is one
    return Served("ens", ModelSettings(archive=str(folder)), 1000)


def test_only_what_concerns_the_archive_loads_it_again(served):
    async def change():
        await served.reconfigure({})
        first = served.ensemble
        await served.reconfigure({"batch_size": 4, "batch_wait_s": 0.5})
        assert served.ensemble is first
        assert served.answer_batch._get_max_batch_size() == 4
        await served.reconfigure({"settings": {"top_k": 1}})
        assert (first.settings.top_k, served.ensemble.settings.top_k) == (5, 1)
        assert served.answer_batch._get_max_batch_size() == 8

    asyncio.run(change())


def test_what_cant_be_loaded_leaves_what_was_served(served):
    async def change():
        await served.reconfigure({})
        first = served.ensemble
        for wrong in ({"archive": "/nowhere/a.mar"}, {"settings": {"topk": 1}}, {"batch": 3}):
            with pytest.raises(EnsembleError):
                await served.reconfigure(wrong)
        assert served.ensemble is first
        await served.check_health()

    asyncio.run(change())


def test_its_health_is_the_models(served, monkeypatch):
    async def ask():
        await served.reconfigure({})
        await served.check_health()

        def fail(*_batch):
            raise RuntimeError("CUDA error")

        monkeypatch.setattr(served.ensemble, "run", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            await served.check_health()

    asyncio.run(ask())
