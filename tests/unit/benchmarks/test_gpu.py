"""benchmarks.gpu without a GPU: it starts anywhere, its rows and verdicts are right, and its file is a result."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu import cells, correctness
from benchmarks.gpu.settings import SETTINGS, Setting
from benchmarks.measuring.measure import describe_machine
from benchmarks.measuring.networks import Network, encoder_network, without_padding
from benchmarks.measuring.roofline import Ceilings, count_work
from benchmarks.options import RIVALS
from benchmarks.reporting.names import name_network
from benchmarks.reporting.results import read_results
from benchmarks.runs import gpu as command
from tests.unit.execution.cuda.fakes import FakeRecorder
from vmap_ensemble.execution import register
from vmap_ensemble.execution.cuda import mode
from vmap_ensemble.execution.timing import Budget

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TINY = Network("tiny", lambda: nn.Linear(16, 4).eval(), lambda batch: (torch.randn(batch, 16),))
BLOCKED = """
import sys
for name in ("pydantic", "ts", "ray", "captum", "httpx", "grpc", "onnx", "onnxruntime", "openvino", "matplotlib"):
    sys.modules[name] = None  # an import of it fails
from benchmarks.gpu.__main__ import main
sys.exit(main(["--quick"]))
"""


@pytest.fixture
def tiny_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small network, and ceilings that nobody has to measure."""
    monkeypatch.setattr(cells, "networks", lambda: {"tiny": TINY})
    monkeypatch.setattr(cells, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11))


def test_it_starts_on_a_bare_machine_and_says_that_there_is_no_gpu() -> None:
    paths = {"PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", BLOCKED], env=paths, capture_output=True, text=True)
    told = "no GPU: torch finds no CUDA device here, so nothing was checked or measured\n"
    assert (done.returncode, done.stderr, done.stdout) == (command.NO_GPU, told, "")


def test_every_setting_has_its_network_and_rivals() -> None:
    known = cells.networks()
    assert [name_network(known[setting.network].title) for setting in SETTINGS] == [one.title for one in SETTINGS]
    assert {rival for setting in SETTINGS for rival in setting.rivals} <= set(RIVALS)
    assert any(setting.quick for setting in SETTINGS)
    assert len({setting.row for setting in SETTINGS}) == len(SETTINGS)


def test_padding_is_no_work() -> None:
    ragged = encoder_network("tiny", layers=1, hidden=24, lengths=(5, 2))
    ids, mask = ragged.make_args(2)
    assert mask.tolist() == [[1] * 5, [1] * 2 + [0] * 3]
    assert [part[0].shape for part in without_padding((ids, mask))] == [(1, 5), (1, 2)]
    network = ragged.build()
    alone = [count_work(network, part, 1).flops for part in without_padding((ids, mask))]
    assert count_work(network, (ids, mask), 3).flops == 3 * sum(alone)


@pytest.mark.usefixtures("tiny_settings")
def test_settings_are_measured_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = cells.measure([Setting("tiny", "tiny", 2, 1, "fp32")], CPU, Budget(60), 0.05)
    rows = {row["rival"]: row for row in cell["rows"]}
    refused = ["loop_graph", "ours_cudagraph", "ours_branches", "ours_compiled_branches"]
    assert list(rows) == ["loop", "stock_vmap", "ours_auto", *refused]
    assert rows["loop_graph"]["left_out"] == "EnsembleError: compared on a GPU only"
    assert rows["ours_auto"]["times_roofline"] > 0
    assert (cell["fastest"], cell["times_the_speed_of"], cell["reached"]) == ("ours_auto", {}, True)
    assert "reached: ours_auto" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_settings")
def test_what_no_time_is_left_for_says_so() -> None:
    (cell,) = cells.measure([Setting("tiny", "tiny", 2, 1)], CPU, Budget(0), 0.05)
    assert (cell["left_out"], cell["rows"]) == ("not measured: 0 s were spent before its turn", [])
    rows = correctness.check_all(CPU, ["fp32"], Budget(0))
    assert {row["error"] for row in rows} == {"not checked: 0 s were spent before its turn"}
    assert {row["handler"].split(":")[0] for row in rows} == {"mnist_handler", "resnet_handler", "bert_handler"}


@pytest.mark.parametrize(
    ("ours_ms", "loop_graph_ms", "compiled_ms", "reached"),
    [(0.7, 8.0, 1.5, True), (0.7, 7.0, 1.5, False), (0.7, 8.0, 1.2, False), (0.8, 9.0, 1.9, False)],
)
def test_a_setting_is_reached_if_every_ratio_and_the_time_are(
    ours_ms: float, loop_graph_ms: float, compiled_ms: float, reached: bool
) -> None:
    setting = Setting("x", "x", 1, 1, over_graph=11.0, over_compile=2.0, most_ms=0.75)
    times = {
        "loop_graph": loop_graph_ms, "loop_reduce_overhead": compiled_ms, "ours_branches": ours_ms, "ours_auto": 9.0,
    }  # fmt: skip
    rows = [{"rival": name, "median_ms": ms, "equal": True} for name, ms in times.items()]
    rows += [{"rival": "ours_cudagraph", "median_ms": 0.1, "equal": False}]  # wrong numbers are no speed
    verdict = cells.judge(setting, rows)
    assert (verdict["fastest"], verdict["reached"]) == ("ours_branches", reached)
    assert cells.judge(setting, [{"rival": "ours_auto", "left_out": "why"}]) == {}


def test_every_mode_of_a_gpu_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "CudaRecorder", FakeRecorder)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    for name in ("cudagraph", "cudagraph_fused", "cudagraph_loop", "branches", "compiled_branches"):
        anywhere = dataclasses.replace(register.find_mode(name), devices=None)
        monkeypatch.setitem(register._MODES, name, anywhere)
    case = next(case for case in correctness.cases() if case.handler.endswith("sequence_classification"))
    for name in set(case.modes) - {"auto", "eager", "reference"}:
        row = correctness.check(case, torch.float32, name, CPU)
        assert (row["error"], row["serves"]) == (None, name)
        assert row["largest_relative_difference"] < 1e-5


@pytest.mark.usefixtures("tiny_settings")
def test_what_fails_is_a_row_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = correctness.Case("a handler", TINY, ("eager", "cudagraph"))
    monkeypatch.setattr(correctness, "cases", lambda: [case])
    monkeypatch.setattr(command, "SETTINGS", (Setting("tiny", "tiny", 2, 1, "fp32", quick=True),))
    monkeypatch.setattr(command, "set_float32_precision", lambda _: None)
    machine = {**describe_machine(CPU), "gpu": "Big GPU 80GB"}
    monkeypatch.setattr(command, "describe_machine", lambda _: machine)
    figures = command.run(CPU, quick=True)
    assert command.report(figures) == 1
    assert "error: a handler, fp16, cudagraph: LoadError: execution 'cudagraph': expected the members on" in (
        capsys.readouterr().err
    )
    path = command.write(tmp_path / "new", figures, quick=False)
    assert path.name == "gpu-big-gpu-80gb.json"
    (result,) = read_results(path.parent)
    assert (result.job, result.table, result.command) == ("gpu", "forward", command.COMMAND)
    assert len(json.loads(path.read_text())["cells"][0]["rows"]) > 3
