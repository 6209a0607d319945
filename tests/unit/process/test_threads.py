"""Cores are shared by the workers."""

from __future__ import annotations

import pytest

from vmap_ensemble.process.threads import cores_at_hand, threads_per_worker


@pytest.mark.parametrize(
    ("config", "cores", "threads"),
    [
        (None, 8, 8),
        ({"maxWorkers": 4}, 8, 2),
        ({"minWorkers": 3}, 8, 2),
        ({"maxWorkers": 16}, 8, 1),
        ({"maxWorkers": 1}, 1, 1),
        ({"maxWorkers": 2}, 1, 1),
        ({"maxWorkers": 2}, 2, 1),
        ({"maxWorkers": 1}, 16, 16),
        ({"maxWorkers": 3}, 16, 5),
    ],
)
def test_threads_per_worker(config, cores, threads):
    assert threads_per_worker(config, cores) == threads


def test_quota_of_the_container(tmp_path):
    limit = tmp_path / "cpu.max"
    limit.write_text("100000 100000\n")
    assert cores_at_hand(limit) == 1
    limit.write_text("max 100000\n")
    assert cores_at_hand(limit) == cores_at_hand(tmp_path / "missing")
