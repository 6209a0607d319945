"""Archives in fp16 and bf16 through every tool, mixed precision while training, and the memory of a forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from archiver.command import main as command
from optimise.distil.command import main as distil
from optimise.distil.train import Training
from optimise.quantise.command import main as quantise
from tests.unit.optimise.test_texts import texts  # noqa: F401, the fixture
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.execution.cpu.kernel_library import load_library
from vmap_ensemble.process.memory import measure_peak

FREE = ("--max-accuracy-loss", "1", "--max-nll-loss", "9", "--epochs", "2")


def in_dtype(archive: Path, dtype: str, place: Path) -> Path:
    """The archive once more, its members served in another type."""
    folder = shutil.copytree(archive, place)
    settings = json.loads((folder / "setup_config.json").read_text())
    (folder / "setup_config.json").write_text(json.dumps({**settings, "dtype": dtype}))
    return folder


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tool", ["one", "heads", "prune"])
def test_what_is_made_of_members_in_half_precision_is_served_in_it(
    tool: str, dtype: str, archive: Path, photos: Path, tmp_path: Path
) -> None:
    halved, output = in_dtype(archive, dtype, tmp_path / "ens"), tmp_path / "out"
    if tool == "prune":
        pytest.importorskip("torch_pruning")
        given = ["prune", str(halved), "--keep", "0.5"]
    else:
        given = ["distil", str(halved), "--to", tool]
    assert command([*given, "--data", str(photos), "--output", str(output), *FREE]) == 0
    made = "pruned" if tool == "prune" else "student"
    report = report_of(output)
    assert report["ensemble"]["size_mib"] * 2**20 < 2.5 * report["ensemble"]["parameters"]
    assert report[made]["agreement"] > 0.5
    name = json.loads((output / "setup_config.json").read_text())
    assert next(iter(name.values()))["dtype"] == dtype
    config = ["--config", str(output / "setup_config.json"), "--output", str(tmp_path / "store"), "--no-check"]
    assert command(["archive", next(iter(name)), *config]) == 0
    served = Ensemble.load(next((tmp_path / "store").glob("*.mar")), execution="eager")
    assert served.outputs(torch.zeros(2, 1, 8, 8)).dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_texts_in_half_precision_are_distilled_and_quantised(
    dtype: str,
    texts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    halved = in_dtype(texts / "reviews", dtype, tmp_path / "reviews")
    given = ["--data", str(texts / "learn.csv"), "--output", str(tmp_path / "student")]
    assert distil([str(halved), *given, *FREE]) == 0
    assert report_of(tmp_path / "student")["student"]["agreement"] > 0.5
    if load_library() is None:
        return  # quantised encoders have a kernel of their own
    quantised = ["--samples", str(texts / "test.jsonl"), "--output", str(tmp_path / "int8.mar")]
    assert quantise([str(halved), *quantised]) == 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_student_learns_in_mixed_precision(
    amp: str, archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, say = set(), Training.say

    def said(self: Training, batch: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            seen.add((torch.get_autocast_dtype("cpu"), self.student(batch).dtype))
        return say(self, batch)

    monkeypatch.setattr(Training, "say", said)
    given = [str(archive), "--data", str(photos), "--output", str(tmp_path / "s"), *FREE, "--amp", amp]
    assert distil(given) == 0
    assert seen == {({"bf16": torch.bfloat16, "fp16": torch.float16}[amp],) * 2}
    report = report_of(tmp_path / "s")
    assert report["recipe"]["amp"] == amp
    assert report["student"]["agreement"] > 0.8  # as in float32
    saved = torch.load(tmp_path / "s" / ".work" / "training.pt", weights_only=True)
    assert bool(saved["scaler"]) == (amp == "fp16")
    assert {tensor.dtype for tensor in saved["student"].values()} == {torch.float32, torch.int64}


def test_a_run_that_is_cut_off_goes_on_in_the_precision_it_began_with(
    archive: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(archive), "--data", str(photos), "--output", str(tmp_path / "s"), *FREE]
    assert distil([*given, "--amp", "bf16"]) == 0
    assert distil([*given, "--amp", "none"]) == 1
    assert "--anew" in capsys.readouterr().err


def test_the_peak_of_a_call_is_what_it_holds_at_once() -> None:
    def run() -> None:
        for _ in range(4):
            torch.ones(2**24)  # 64 MiB, freed before the next

    peak = measure_peak(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("the system doesn't tell")
    assert 60 * 2**20 < peak < 130 * 2**20
