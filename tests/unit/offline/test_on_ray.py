"""What a process of `predict --on ray` does, without a cluster; with one: tests/server/test_ray_serve.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import seeded, write_archive
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.offline.command import main, parse_arguments
from vmap_ensemble.offline.on_ray import Answering, Job, OnRayError, check_ray
from vmap_ensemble.tasks.answers import Options

ROWS = 140  # two windows of images, and a part of a third


@pytest.fixture
def job(tmp_path: Path) -> Job:
    states = {f"m{index}": seeded(MnistNet, index).state_dict() for index in range(2)}
    archive = write_archive(tmp_path / "ens", states, {"handler": "mnist_handler.py"})
    table = tmp_path / "rows.jsonl"
    pixels = [[[(row + column * number) % 7 for column in range(28)] for row in range(28)] for number in range(ROWS)]
    table.write_text("".join(f"{json.dumps({'data': [image]})}\n" for image in pixels))
    loading = {"dtype": None, "execution": "eager", "threads": 1, "batch_sizes": (1, 8)}
    return Job(str(archive), table, None, Options(top_k=1), 8, None, loading)


def lines_of(answering: Answering, *windows: int) -> list[list[str]]:
    return [text.split("\n") for text in answering({"window": windows})["lines"]]


def test_windows_are_those_of_one_machine_in_whatever_order(job: Job, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    command = [job.archive, str(job.input), "--output", str(target), "--batch-size", "8", "--top-k", "1"]
    assert main([*command, "--threads", "1"]) == 0
    expected = target.read_text().splitlines()
    assert "answer" in json.loads(expected[0])
    answering = Answering(job)
    # Those between are passed over; an earlier one is read again, as after another process has ended.
    assert lines_of(answering, 0, 2) == [expected[:64], expected[128:]]
    assert lines_of(answering, 1) == [expected[64:128]]


def test_without_ray_nothing_is_begun(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(OnRayError, match=r"--on ray: needs Ray; pip install 'vmap-ensemble\[ray\]'"):
        check_ray()


def test_each_process_has_a_device_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["a.mar", "rows.jsonl", "--output", "b.jsonl", "--on", "ray", "--device", "cuda:0", "cuda:1"])
    assert "--device: expected one with --on ray" in capsys.readouterr().err
