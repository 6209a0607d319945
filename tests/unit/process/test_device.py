"""Settings decide torch's precision in the worker, whatever TorchServe set at import."""

import gc
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmap_ensemble.process.age import seconds_since_process_start
from vmap_ensemble.process.device import choose_dtype, configure_torch
from vmap_ensemble.process.memory import freed_memory_returned

PATHS = {"PYTHONPATH": str(Path(__file__).parents[3] / "handlers")}


@pytest.fixture(autouse=True)
def restore_torch():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.set_num_threads(before[2])


@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_tf32_of_convolutions_follows_that_of_products(precision, tf32):
    torch.backends.cudnn.allow_tf32 = not tf32
    configure_torch(torch.get_num_threads(), precision)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize(("dtype", "kernels", "warned"), [("fp16", False, 1), ("fp16", True, 0), ("bf16", False, 0)])
def test_float16_without_kernels_is_logged(monkeypatch, caplog, dtype, kernels, warned):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: kernels)
    with caplog.at_level(logging.WARNING):
        chosen = choose_dtype(dtype, torch.device("cpu"))
    assert chosen == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert sum("no float16 kernels" in message for message in caplog.messages) == warned


FREED = """
import psutil, torch
from vmap_ensemble.process.memory import freed_memory_returned, keep_freed_memory
rss_mib = lambda: psutil.Process().memory_info().rss / 2**20
if not keep_freed_memory():
    raise SystemExit(77)
before = rss_mib()
with freed_memory_returned():
    circle = [torch.ones(2**18) for _ in range(256)]
    circle.append(circle)
    held = torch.ones(2**18)  # so that the freed ones don't lie at the end, where free() would hand them back
    tensors = [torch.ones(2**18) for _ in range(256)]
    also_held = torch.ones(2**18)
    del circle, tensors
    kept = rss_mib()
print(kept - before, rss_mib() - before)
"""


def test_freed_memory_is_kept_until_it_is_returned():
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env={**os.environ, **PATHS})
    if run.returncode == 77:
        pytest.skip("no glibc to tell")
    assert run.returncode == 0, run.stderr
    kept_mib, returned_mib = map(float, run.stdout.split())
    assert kept_mib > 400  # of 512 MiB, half of them in a circle
    assert returned_mib < 50


def test_after_a_load_that_fails_older_objects_are_the_collectors_again():
    frozen = []

    def load():
        with freed_memory_returned():
            frozen.append(gc.get_freeze_count())
            raise KeyError("no such member")

    with pytest.raises(KeyError):
        load()
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0


def test_the_age_of_a_process_is_exact_to_a_tick():
    before = time.monotonic()
    process = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.1)
        assert 0.08 <= seconds_since_process_start(process.pid) <= time.monotonic() - before + 0.03
    finally:
        process.kill()
        process.wait()
    assert seconds_since_process_start() > 0.1
