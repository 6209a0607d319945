"""Fixtures that turn state dicts into an unpacked archive, and request rows into a real handler's replies."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mnist_handler import MnistHandler
from vmap_ensemble.archive.manifest import Manifest, hash_file
from vmap_ensemble.core.members import Member
from vmap_ensemble.core.states import find_ties
from vmap_ensemble.models.mnist import MnistNet

SERVERS = "tests/server/"


def pytest_configure():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(SERVERS))  # the longest part of `-n` begins first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Say what `-n` may split: a file stays whole for its fixtures' sake, and one process starts all servers.

    A server's ports are free when they are chosen and taken seconds later, so another process could take them; and a
    server beside another has half a core. Marks of groups won't do: pytest 9.2 reads no ids that xdist 3.8 writes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return SERVERS if nodeid.startswith(SERVERS) else nodeid.partition("::")[0]

    return Scheduler(config, log)


def write_archive(folder, states, settings=None, shared=None):
    """Write an unpacked archive: members (and what they share), manifest, settings; not measured but eager."""
    folder = Path(folder)
    (folder / "members").mkdir(parents=True, exist_ok=True)

    def row(name, state):
        path = folder / "members" / f"{name}.safetensors"
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
        return Member(
            name, f"members/{path.name}", hash_file(path), f"{name}.pt", path.stat().st_size, hash_file(path)
        )

    ties = find_ties(list(states.values()))
    kept = {name: {k: t for k, t in state.items() if k not in ties} for name, state in states.items()}
    rows = tuple(row(name, state) for name, state in kept.items())
    manifest = Manifest(rows, row("shared", shared) if shared else None, ties)
    (folder / "members.json").write_text(manifest.to_json())
    (folder / "setup_config.json").write_text(json.dumps({"name": "ens", "execution": "eager", **(settings or {})}))
    return folder


def seeded(build, seed):
    """A model in eval mode whose parameters follow from the seed, and whose buffers are not the defaults."""
    torch.manual_seed(seed)
    model = build()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            with torch.no_grad():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else -0.5))
    return model.eval()


def real_context(folder, metrics=None, config=None):
    """TorchServe's own context of a worker that has unpacked an archive; TorchServe ends with Python 3.12."""
    ts = pytest.importorskip("ts.context")
    return ts.Context("ens", str(folder), {}, 8, None, "0.12", metrics=metrics, model_yaml_config=config or {})


def send(handler, rows, headers=None):
    """Hand a batch to a handler as TorchServe does; [(status, JSON)]."""
    ts = pytest.importorskip("ts.context")
    context = handler.context
    headers = headers or [{} for _ in rows]
    context.request_processor = [ts.RequestProcessor(dict(h)) for h in headers]
    context.request_ids = {i: f"id{i}" for i in range(len(rows))}
    texts = handler.handle(rows, context)
    for text in texts:
        text.encode("utf-8")  # the worker does; what fails there kills the whole batch
    return [(context.get_response_status(i)[0], json.loads(text)) for i, text in enumerate(texts)]


def encode(array, kind="PNG", **options):
    """An image file's bytes."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def ft_library():
    """The FasterTransformer library, built and loaded; tests that need it skip where there is no compiler."""
    from fastertransformer import library
    from vmap_ensemble.encoders.traced.library import load_ft_library

    try:
        library.find_compiler()
    except library.BuildError as error:
        pytest.skip(str(error))
    # FT_LIBRARY: a build of one's own, such as one with AddressSanitizer.
    path = Path(os.environ.get("FT_LIBRARY") or library.ensure_library())
    load_ft_library(path)
    return path


@pytest.fixture
def make_archive(tmp_path):
    return lambda states, settings=None, shared=None: write_archive(tmp_path / "ar", states, settings, shared)


@pytest.fixture
def make_context():
    return real_context


@pytest.fixture
def ask():
    return send


@pytest.fixture
def image_file():
    return encode


@pytest.fixture
def make_model():
    return seeded


@pytest.fixture
def make_mnist(make_archive):
    """An initialised MNIST handler and its plain members."""

    def make(count=3, settings=None, change=None, metrics=None, handler=MnistHandler, config=None):
        models = {f"m{i}": seeded(MnistNet, i) for i in range(count)}
        for name, model in models.items():
            if change:
                change(name, model)
        folder = make_archive({name: model.state_dict() for name, model in models.items()}, settings)
        served = handler()
        served.initialize(real_context(folder, metrics, config))
        return served, models

    return make


@pytest.fixture
def digit():
    """A random image of a digit's size, as a PNG file."""
    return lambda seed=0: encode(np.random.default_rng(seed).integers(0, 256, (28, 28)))
