"""One ONNX graph of all members, in ONNX Runtime and OpenVINO, against the members' own plain forwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import Member, stack_members
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.onnx import mode, packages
from vmap_ensemble.execution.onnx.graph import export_members, reasons_against
from vmap_ensemble.execution.register import ExecutionOptions

X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution that members may share, another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.own = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.own(torch.relu(self.trunk(x)))).relu()
        return self.head(x.flatten(1))


class Several(Net):
    """Two outputs, by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"logits": y, "norms": y.norm(dim=-1)}


class Looping(nn.Module):
    """What a graph can't hold for many members: a choice by the values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t * self.weight, lambda t: t - self.weight, (x,))


def join(make: type[nn.Module], count: int, shared: str = "", dtype: torch.dtype = torch.float32) -> EnsembleForward:
    """The forward of seeded members, of which one layer may be the same in all."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(make().eval())
        if shared:
            models[seed].get_submodule(shared).load_state_dict(models[0].get_submodule(shared).state_dict())
    states = {f"m{seed}": model.state_dict() for seed, model in enumerate(models)}
    members = stack_members(states, torch.device("cpu"), dtype)
    members = dataclasses.replace(members, members=tuple(Member(name, "", f"sha-{name}", "", 0) for name in states))
    return EnsembleForward(make().eval(), members)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_any_batch_equals_the_members_own_forwards(count: int, name: str) -> None:
    pytest.importorskip(name)
    forward = join(Net, count)
    execution = build_execution(name, forward, [(X,)])
    for batch in (X[:1], X, torch.cat([X, X])):
        with torch.inference_mode():
            torch.testing.assert_close(execution(batch), forward.loop(batch), rtol=1e-4, atol=1e-5)


def test_what_members_share_is_computed_once() -> None:
    kinds = [node.op_type for node in export_members(join(Net, 4, shared="trunk"), (X,)).model.graph]
    assert kinds.count("Conv") == 1 + 4
    kinds = [node.op_type for node in export_members(join(Net, 4), (X,)).model.graph]
    assert kinds.count("Conv") == 4 + 4


def test_outputs_keep_their_names_and_structure() -> None:
    forward = join(Several, 2)
    graph = export_members(forward, (X,))
    assert (graph.inputs, graph.outputs) == (("input",), ("logits", "norms"))
    outputs = build_execution("onnxruntime", forward, [(X,)])(X)
    with torch.inference_mode():
        expected = forward.loop(X)
    assert outputs.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(outputs[key], expected[key], rtol=1e-4, atol=1e-5)


def test_what_has_no_graph_is_refused_with_the_reason() -> None:
    assert reasons_against(join(Net, 2, dtype=torch.bfloat16)) == ["expected members in float32"]
    with pytest.raises(LoadError, match=r"execution 'onnxruntime': expected members in float32"):
        build_execution("onnxruntime", join(Net, 2, dtype=torch.bfloat16), [(X.bfloat16(),)])
    with pytest.raises(LoadError, match=r"can't be exported to ONNX"):
        export_members(join(Looping, 2), (torch.randn(2, 5),))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = mode.importlib.util.find_spec
    missing = {"onnxscript", "openvino"}
    monkeypatch.setattr(mode.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(LoadError, match=r"execution 'onnxruntime': onnxscript: not installed"):
        build_execution("onnxruntime", join(Net, 2), [(X,)])
    with pytest.raises(LoadError, match=r"execution 'openvino': openvino, onnxscript: not installed"):
        build_execution("openvino", join(Net, 2), [(X,)])


@pytest.fixture
def packed(tmp_path: Path) -> tuple[EnsembleForward, Path]:
    """A forward, and the folder of an archive with its graph."""
    forward = join(Net, 2)
    packages.write_onnx(export_members(forward, (X,)), forward.members, tmp_path)
    return forward, tmp_path


def test_a_packed_graph_serves_without_the_exporter(
    packed: tuple[EnsembleForward, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, folder = packed
    monkeypatch.setattr(mode, "EXPORTERS", ("no-such-package",))
    options = ExecutionOptions(graph_folder=folder)
    execution = build_execution("onnxruntime", forward, [(X,)], options)
    with torch.inference_mode():
        torch.testing.assert_close(execution(X), forward.loop(X), rtol=1e-4, atol=1e-5)


def test_auto_looks_at_a_packed_graph_alone(packed: tuple[EnsembleForward, Path]) -> None:
    forward, folder = packed
    for options, is_there in ((ExecutionOptions(graph_folder=folder), True), (ExecutionOptions(), False)):
        found = {row.name: row for row in build_execution("auto", forward, [(X,)], options).candidates}
        assert (found["onnxruntime"].refused is None) == is_there
    assert "60 s of the budget" in (found["onnxruntime"].refused or "")


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PROTOBUF_BYTES", 100)
    forward = join(Net, 2)
    packages.write_onnx(export_members(forward, (X,)), forward.members, tmp_path)
    files = json.loads((tmp_path / "onnx" / "onnx.json").read_text())["files"]
    assert set(files) == {"members.onnx", "members.onnx.data"}
    execution = build_execution("onnxruntime", forward, [(X,)], ExecutionOptions(graph_folder=tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(execution(X), forward.loop(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "onnx.json").write_text("[]"), "onnx.json: malformed"),
        (lambda root: (root / "members.onnx").unlink(), r"onnx: expected members.onnx, got "),
        (lambda root: (root / "more").write_text("x"), "onnx: expected members.onnx, got members.onnx, more"),
        (lambda root: (root / "members.onnx").open("ab").write(b"x"), "changed after it was archived"),
    ],
)
def test_files_that_were_changed_are_not_loaded(
    packed: tuple[EnsembleForward, Path], change: Any, message: str
) -> None:
    forward, folder = packed
    change(folder / "onnx")
    with pytest.raises(LoadError, match=message):
        build_execution("onnxruntime", forward, [(X,)], ExecutionOptions(graph_folder=folder))


def test_a_graph_of_other_members_is_not_loaded(packed: tuple[EnsembleForward, Path]) -> None:
    _, folder = packed
    other = join(Net, 2)
    rows = tuple(Member(name, "", f"other-{name}", "", 0) for name in other.members.names)
    other.members = dataclasses.replace(other.members, members=rows)
    with pytest.raises(LoadError, match="made of other members"):
        build_execution("onnxruntime", other, [(X,)], ExecutionOptions(graph_folder=folder))
