"""`./archive.sh --onnx`: what is packed, that it serves the members' values, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from archiver.packing import onnx_graph
from tests.archive.conftest import Project
from vmap_ensemble import Ensemble


def test_a_packed_graph_is_one_way_to_serve(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.run("tiny", "--onnx", "--set", "execution=onnxruntime", check=True) == 0
    assert "onnxruntime: asked for" in capsys.readouterr().out
    folder = project.unpack()
    told = json.loads((folder / "onnx" / "onnx.json").read_text())
    assert (told["inputs"], told["outputs"]) == (["input"], ["output"])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    served, plain = Ensemble.load(project.mar), Ensemble.load(project.mar, execution="eager")
    assert (served.execution.name, plain.execution.name) == ("onnxruntime", "eager")
    torch.testing.assert_close(served.outputs(x), plain.outputs(x), rtol=1e-4, atol=1e-5)


def test_a_packed_graph_that_no_engine_runs_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmap_ensemble.execution.onnx import mode

    assert project.run("tiny", "--onnx") == 0
    find = mode.importlib.util.find_spec
    engines = {"onnxruntime", "openvino"}
    monkeypatch.setattr(mode.importlib.util, "find_spec", lambda name: None if name in engines else find(name))
    ensemble = Ensemble.load(project.mar, execution="auto")
    assert ensemble.fallbacks() == ["onnx refused"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"dtype": "bf16"}, "--onnx: expected members in float32"),
        ({"extra_files": ["onnx"]}, "onnx"),
    ],
)
def test_what_is_refused(
    project: Project, block: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "onnx").mkdir()
    (project.folder / "onnx" / "mine.txt").write_text("x")
    project.block(**block)
    samples = ["--samples", str(project.folder / "input.json")] if "dtype" in block else []
    (project.folder / "input.json").write_text("[0.5, -1.0, 2.0]")
    assert project.run("tiny", "--onnx", *samples) == 1
    assert message in capsys.readouterr().err
    assert project.leftovers() == []


def test_a_missing_exporter_is_named_before_any_work(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_graph, "EXPORTERS", ("no_such_package",))
    assert project.run("tiny", "--onnx") == 1
    assert "--onnx: needs no_such_package: pip install 'vmap-ensemble[onnx]'" in capsys.readouterr().err
