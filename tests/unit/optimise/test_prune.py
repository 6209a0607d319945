"""vmap-ensemble prune: one importance, shapes that stay one, archives that answer, runs that go on, bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("torch_pruning")

from archiver.__main__ import main as archive_command
from archiver.command import main as command
from optimise.distil.train import Training
from optimise.examples.teacher import Teacher
from optimise.gate.report import as_markdown
from optimise.prune.command import main
from optimise.prune.structure import cut_members, least_important
from optimise.prune.students import MembersStudent, mask_smallest, share_of_zeros
from tests.conftest import write_archive
from tests.unit.optimise.conftest import HANDLER, MODEL, NAMES, batch_of, tiny
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import build_architecture
from vmap_ensemble.models.pruned import narrow, widths_of

ROOT = Path(__file__).resolve().parents[3]


def prune(archive: Path, data: Path, output: Path, *more: str) -> int:
    short = [] if "--epochs" in more else ["--epochs", "2"]
    free = [] if "--max-accuracy-loss" in more else ["--max-accuracy-loss", "1", "--max-nll-loss", "9"]
    return main([str(archive), "--data", str(data), "--output", str(output), *short, *free, *more])


def states_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


# --- what is cut -------------------------------------------------------------------------------------------------


def test_the_least_important_go_in_units_and_multiples() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert least_important(scores, 0.5) == [1, 3]
    assert least_important(scores, 0.01) == [1, 2, 3]  # one stays
    assert least_important(scores, 0.5, unit=2) == [2, 3]  # 4 against 2.5
    kept = 40 - len(least_important(torch.rand(40), 0.5))
    assert kept % 8 == 0


def test_narrowed_layers_have_the_shapes_that_slicing_gives() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(5, 4)
    model = nn.Sequential(*layers)
    narrow(model, {"0": [3, 6, 1], "1": [6], "2": [6, 6, 6], "3": [5, 2]}, "x.json")
    assert model[0].weight.shape == (6, 3, 3, 3)
    assert model[1].running_var.shape == (6,)
    assert model[2].weight.shape == (6, 1, 3, 3)
    assert model(torch.rand(2, 3, 5, 9)).shape == (2, 6, 1, 2)
    assert widths_of(model)["2"] == [6, 6, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected {'architecture': ..., 'widths': {...}}, got JSONDecodeError"),
        ('{"architecture": "mnist"}', "got KeyError: 'widths'"),
        ('{"architecture": "p.json", "widths": {}}', "expected the name of an architecture"),
        ('{"architecture": "mnist", "widths": {"conv9": [1, 2, 1]}}', "MnistNet has no layer 'conv9'"),
        (
            '{"architecture": "mnist", "widths": {"conv1": [1, 64, 1]}}',
            "numbers from 1 to [1, 32, 1], got [1, 64, 1]",
        ),
        ('{"architecture": "mnist", "widths": {"conv1": [1, true, 1]}}', "widths of 'conv1'"),
    ],
)
def test_a_wrong_file_of_widths(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(SettingsError, match=re.escape(message)):
        build_architecture("p.json", 10, tmp_path)
    with pytest.raises(SettingsError, match="no such file in the root"):
        build_architecture("../p.json", 10, tmp_path)


def test_masks_hide_the_smallest_weights_of_all_layers_but_the_last() -> None:
    torch.manual_seed(0)
    model = tiny().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mask_smallest(model, 0.25, "fc")
    (state,) = MembersStudent([model], ["a"], None).states().values()
    assert list(state) != []
    assert set(state) == set(before)
    torch.testing.assert_close(state["fc.weight"], before["fc.weight"])
    hidden = state["conv.weight"] == 0
    assert int(hidden.sum()) == 27
    assert before["conv.weight"][hidden].abs().max() <= before["conv.weight"][~hidden].abs().min()
    assert share_of_zeros({"w": torch.tensor([[0.0, 1.0]]), "b": torch.zeros(5)}) == 0.5


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(archive: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prune") / "pruned"
    assert prune(archive, photos, output, "--epochs", "6", "--lr", "0.01") == 0
    return output


def test_all_members_lose_the_same_channels(archive: Path, pruned: Path) -> None:
    before = states_in(archive / "members")
    importance = []
    for state in before.values():  # by plain torch: the filter, its scale, and what fc reads of its 3 x 3 map
        read = state["fc.weight"].square().sum(0).reshape(4, 9).sum(1)
        own = state["conv.weight"].square().sum((1, 2, 3)) + state["norm.weight"].square() + read
        importance.append(own / own.mean())
    kept = torch.stack(importance).mean(0).argsort(descending=True)[:2].sort().values
    for cut, state in zip(cut_members(Teacher(Ensemble.load(archive)), 0.5), before.values(), strict=True):
        torch.testing.assert_close(cut.conv.weight, state["conv.weight"][kept])
        torch.testing.assert_close(cut.fc.weight, state["fc.weight"].reshape(3, 4, 9)[:, kept].flatten(1))
    told = json.loads((pruned / "pruned.json").read_text())
    assert told["architecture"] == "model.py:Tiny"
    assert told["widths"] == {"conv": [1, 2, 1], "norm": [2], "fc": [18, 3]}
    for state in states_in(pruned).values():
        assert {key: list(tensor.shape) for key, tensor in state.items() if tensor.dim() > 1} == {
            "conv.weight": [2, 1, 3, 3],
            "fc.weight": [3, 18],
        }
    assert list(states_in(pruned)) == ["m0", "m1", "m2"]


def test_the_archive_of_pruned_members_answers(photos: Path, pruned: Path, tmp_path: Path) -> None:
    report = json.loads((pruned / "report.json").read_text())
    assert "| pruned |" in as_markdown(report).splitlines()[0]
    assert report["pruned"]["parameters"] < report["ensemble"]["parameters"] * 0.6
    assert report["pruned"]["accuracy"] > 0.6
    config = str(pruned / "setup_config.json")
    assert archive_command(["ens_pruned", "--no-check", "--config", config, "--output", str(tmp_path)]) == 0
    packed = Ensemble.load(tmp_path / "ens_pruned.mar")
    x, y = batch_of(150, 5)
    outputs = packed.outputs(x)
    model = build_architecture("pruned.json", 3, pruned)
    for own, state in zip(outputs, states_in(pruned).values(), strict=True):
        model.load_state_dict(state)
        torch.testing.assert_close(own, model(x), rtol=1e-4, atol=1e-5)
    assert (packed.probabilities(x).argmax(1) == y).float().mean() > 0.6
    (answer,) = packed.predict([next(photos.rglob("*.png"))])
    assert answer.body["prediction"]["label"] in NAMES
    assert answer.body["uncertainty"]["mutual_information"] > 0


def test_what_is_pruned_can_be_pruned_again(photos: Path, pruned: Path, tmp_path: Path) -> None:
    config = str(pruned / "setup_config.json")
    assert archive_command(["ens_pruned", "--no-check", "--config", config, "--output", str(tmp_path)]) == 0
    assert prune(tmp_path / "ens_pruned.mar", photos, tmp_path / "twice", "--epochs", "1") == 0
    told = json.loads((tmp_path / "twice" / "pruned.json").read_text())
    assert told == {"architecture": "model.py:Tiny", "widths": {"conv": [1, 1, 1], "norm": [1], "fc": [9, 3]}}


def test_a_killed_run_goes_on(archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert prune(archive, photos, whole) == 0
    plain, calls = Training._run_epoch, []

    def killed(self: Training, step: object) -> float:
        calls.append(self.epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, step)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "_run_epoch", killed)
    assert prune(archive, photos, cut) == 130
    assert not list(cut.glob("*.safetensors"))
    assert prune(archive, photos, cut) == 0
    assert calls == [0, 1, 1]
    first, second = states_in(whole), states_in(cut)
    assert all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])


def test_unstructured_pruning_keeps_the_shapes_and_says_what_it_is_worth(
    archive: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    assert prune(archive, photos, tmp_path / "s", "--unstructured", "--keep", "0.25", "--epochs", "1") == 0
    assert "nothing is faster or smaller for it" in capsys.readouterr().out
    for state in states_in(tmp_path / "s").values():
        assert state["conv.weight"].shape == (4, 1, 3, 3)
        assert int((state["conv.weight"] == 0).sum()) == 27
    block = json.loads((tmp_path / "s" / "setup_config.json").read_text())["ens_pruned"]
    assert block["architecture"] == "model.py:Tiny"


def test_the_gate_refuses_and_force_writes(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    strict = ["--max-accuracy-loss", "1", "--max-nll-loss", "-9", "--epochs", "1"]
    assert prune(archive, photos, tmp_path / "s", *strict) == 1
    assert "prune: refused: NLL" in capsys.readouterr().err
    assert not (tmp_path / "s" / "setup_config.json").exists()
    page = (tmp_path / "s" / "report.html").read_text()
    assert "refused" in page
    assert page.count("<svg") >= 4
    assert len(page) < 50_000
    assert prune(archive, photos, tmp_path / "s", *strict, "--force") == 0
    assert (tmp_path / "s" / "setup_config.json").is_file()


# --- bad input ---------------------------------------------------------------------------------------------------

OWN = HANDLER + "    def build_model(self):\n        return super().build_model()\n"
LONELY = """
from torch import nn
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""


@pytest.mark.parametrize(
    ("model", "handler", "message"),
    [
        (LONELY, HANDLER, "Tiny: no layer has channels to cut at --keep 0.5"),
        (MODEL.replace(".flatten(1)", ".reshape(-1, 36)"), HANDLER, "Tiny: its channels can't be followed (mat1"),
        (MODEL, OWN, "'ens': its handler builds the model; expected the setting 'architecture'"),
    ],
)
def test_networks_that_can_not_be_followed(
    archive: Path, photos: Path, tmp_path: Path, capsys, model: str, handler: str, message: str
) -> None:
    space: dict = {"__name__": "tiny"}
    exec(model, space)
    torch.manual_seed(0)
    states = {name: space["Tiny"]().state_dict() for name in "ab"}
    settings = {"handler": "tiny_handler.py", "architecture": "model.py:Tiny", "num_classes": 3}
    folder = write_archive(tmp_path / "ens", states, settings)
    (folder / "model.py").write_text(model)
    (folder / "tiny_handler.py").write_text(handler)
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(NAMES))))
    assert prune(folder, photos, tmp_path / "s", "--epochs", "1") == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_bad_data_is_one_line_and_nothing_is_written(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    table = tmp_path / "t.csv"
    table.write_text("path,label\nx.png,cow\n")
    for data, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "holds no file that ends in"),
        (table, "label 'cow': no member knows it"),
    ):
        assert prune(archive, data, tmp_path / "s") == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "s").exists()
    for more, message in ((["--keep", "1"], "--keep: expected a share"), (["--epochs", "0"], "--epochs: expected 1")):
        with pytest.raises(SystemExit, match="2"):
            command(["prune", "ens.mar", "--data", "d", "--output", "o", *more])
        assert message in capsys.readouterr().err


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run_as_written(
    archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny archive, under the names that the page has, and with no more than one epoch."""
    page = (ROOT / "docs" / "prune.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}(vmap-ensemble prune .*|\./archive\.sh .*)$", page, re.M)
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    block = json.loads((archive / "setup_config.json").read_text())
    folder = shutil.copytree(archive, tmp_path / "model_store" / "photos_ens.mar")
    (folder / "setup_config.json").write_text(json.dumps({**block, "name": "photos_ens"}))
    shutil.copytree(photos, tmp_path / "photos")
    for line in lines:
        name, *arguments = shlex.split(line)
        if name == "vmap-ensemble":
            assert command([*arguments, "--epochs", "1", "--max-accuracy-loss", "1", "--max-nll-loss", "9"]) == 0
        else:
            assert archive_command([*arguments, "--no-check", "--output", "model_store"]) == 0
    assert (tmp_path / "model_store" / "photos_ens_pruned.mar").is_file()
