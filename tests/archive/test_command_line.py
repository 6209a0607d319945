"""An archive from the command line alone, quick commands, and an archive that is loaded once before it is done."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision.models import resnet18, squeezenet1_1

from archiver.__main__ import main
from archiver.blocks.worker_config import DEFAULT, describe_worker
from archiver.checking import check
from archiver.checking.check import load_stage
from archiver.command_line import parse_arguments
from archiver.members import guess
from archiver.packing.pack import write_mar
from archiver.source import Source
from tests.archive.conftest import MODEL, Project
from vmap_ensemble.archive.identity import identify
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.execution.choice_cache import MOST_MEASUREMENTS
from vmap_ensemble.process.device import cpu_kind

ROOT = Path(__file__).resolve().parents[2]


def read(project: Project, name: str) -> Any:
    with zipfile.ZipFile(project.mar) as archive:
        text = archive.read(name).decode()
    return json.loads(text) if name.endswith("json") else yaml.safe_load(text)


# --- quick commands --------------------------------------------------------------------------------------------

SLOW = {"torch", "torchvision", "transformers"}
# Blocks are checked by pydantic, once there is something to build.
QUICK = [
    ("archiver", ["--help"], 0),
    ("archiver", ["--list"], 0),
    ("archiver", ["--nonsense"], 2),
    ("archiver", ["x", "--handler", "mnist_handler.py", "--members", "nosuch.pt"], 1),
    ("archiver", ["x", "--handler", "mnist_handler.py", "--members", "nosuch/*.pt"], 1),
    ("archiver", ["--check", "nosuch.mar"], 1),
    ("archiver", ["nosuch"], 1),
    ("archiver.command", ["--help"], 0),
    ("archiver.command", ["archive", "--help"], 0),
    ("archiver.command", ["list"], 0),
    ("archiver.command", ["predict", "--help"], 0),
    ("archiver.command", ["predict", "a.mar"], 2),
]


@pytest.mark.parametrize(("module", "arguments", "code"), QUICK)
def test_quick_commands_import_nothing_slow(module: str, arguments: list[str], code: int) -> None:
    script = (
        "import runpy, sys\nsys.argv[1:] = sys.argv[2:]\ncode = 0\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        f"slow = {SLOW | ({'pydantic'} if code != 1 else set())} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else code + 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code + 10, done.stderr  # 1 alone is what an exception ends with


@pytest.mark.parametrize("arguments", [["--memb", "a.pt"], ["x", "--hand", "h.py"]])
def test_options_are_not_abbreviated(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)


def test_no_command_takes_abbreviations() -> None:
    wrong = []
    for folder in (
        "handlers",
        "archiver",
        "training",
        "benchmarks",
        "scripts",
        "fastertransformer",
        "optimise",
        "quality",
    ):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "ArgumentParser":
                    given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
                    wrong += [path.name] * (given.get("allow_abbrev") is not False)
    assert not wrong


# --- the command line is enough --------------------------------------------------------------------------------


def test_an_archive_without_a_block(project: Project, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["ham", "spam"]')
    (tmp_path / "mine.yaml").write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\n")
    (tmp_path / "two.py").write_text(MODEL + "class Helper(nn.Module):\n    pass\n")
    (tmp_path / "setup_config.json").unlink()
    code = project.run(
        *("tiny", "--members", "m0.pt", "m1.pt", "--handler", "tiny_handler.py", "--model-file", "two.py:Tiny"),
        *("--labels", "labels.json", "--model-config", "mine.yaml", "--version", "2.1", "--input-shape", "3"),
        *("--set", "temperature=1.5", "top_k=2", 'weights={"m0": 2, "m1": 1}', "--set", "name2=x"),
    )
    assert code == 1  # name2 is no setting
    arguments = [
        *("tiny", "--members", "m0.pt", "m1.pt", "--handler", "tiny_handler.py", "--model-file", "two.py:Tiny"),
        *("--labels", "labels.json", "--model-config", "mine.yaml", "--version", "2.1", "--input-shape", "3"),
        *("--set", "temperature=1.5", "top_k=2", 'weights={"m0": 2, "m1": 1}'),
    ]
    assert project.run(*arguments) == 0
    settings = read(project, "setup_config.json")
    assert {key: settings[key] for key in ("architecture", "input_shape", "temperature", "top_k", "weights")} == {
        "architecture": "two.py:Tiny",
        "input_shape": [3],
        "temperature": 1.5,
        "top_k": 2,
        "weights": {"m0": 2, "m1": 1},
    }
    assert read(project, "MAR-INF/MANIFEST.json")["model"] == {
        "modelName": "tiny",
        "handler": "tiny_handler.py",
        "modelVersion": "2.1",
        "configFile": "mine.yaml",
    }
    assert read(project, "mine.yaml")["batchSize"] == 4
    (answer,) = Ensemble.load(project.mar, execution="eager").predict([torch.ones(3)])
    assert answer.body["prediction"]["label"] in ("ham", "spam")


def test_the_command_line_wins_over_the_block(project: Project) -> None:
    project.block(top_k=1, version="3.0", temperature=2.0)
    assert project.run("tiny", "--set", "top_k=2", "--version", "4.0") == 0
    settings = read(project, "setup_config.json")
    assert (settings["top_k"], settings["temperature"]) == (2, 2.0)
    assert read(project, "MAR-INF/MANIFEST.json")["model"]["modelVersion"] == "4.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--set", "temprature=2"], "temperature"),
        (["tiny", "--labels", "none.json"], "none.json: no such file"),
        (["tiny", "--model-config", "none.yaml"], "none.yaml: no such file"),
        (["tiny", "--model-file", "none.py:Tiny"], "none.py: no such file"),
        (["tiny", "--version", "a/b"], "version: expected digits"),
    ],
)
def test_one_line_for_what_is_wrong(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert project.run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--input-shape", "3", "x"], "--input-shape: expected whole numbers"),
        (["tiny", "--set", "top_k"], "--set: expected KEY=VALUE, got top_k"),
        (["a", "b", "--labels", "l.json"], "--labels goes with one NAME"),
        (["--all", "--version", "2"], "--version goes with one NAME"),
        (["--check", "a.mar", "--tune"], "--tune goes with NAME or --all"),
        (["tiny", "--tune", "--no-check"], "--tune loads the archive; leave --no-check away"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_shapes_in_two_forms() -> None:
    for given in (["3", "160", "160"], ["3,160,160"]):
        assert parse_arguments(["x", "--input-shape", *given]).input_shape == [3, 160, 160]


def test_members_of_equal_file_names_are_called_after_their_folders(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.archive.conftest import tiny_state

    for seed in range(2):
        project.save(f"runs/seed{seed}/best.ckpt", {"state_dict": tiny_state(seed)})
    assert project.run("tiny", "--members", "runs/*/best.ckpt") == 0
    assert [row["name"] for row in read(project, "members.json")["members"]] == ["seed0-best", "seed1-best"]
    project.save("runs/seed1/best.ckpt", {"state_dict": {"other": torch.zeros(2)}})
    assert project.run("tiny", "--members", "runs/*/best.ckpt", "--force") == 1
    assert "best.ckpt (seed1-best)" in capsys.readouterr().err


# --- what fits instead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_network_that_has_these_keys_is_offered(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int
) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        state = squeezenet1_1(num_classes=classes).state_dict()
        project.save(f"folds/{seed}.ckpt", {"state_dict": {f"model.{key}": value for key, value in state.items()}})
    arguments = ["tiny", "--members", "folds", "--handler", "resnet_handler.py"]
    (tmp_path / "setup_config.json").unlink()
    assert project.run(*arguments) == 1
    error = capsys.readouterr().err
    assert "no architecture was named, so the handler's own torchvision:resnet18 was assumed" in error
    assert (
        "torchvision:squeezenet1_1 has exactly these keys and shapes: --architecture torchvision:squeezenet1_1"
        in error
    )
    assert project.run(*arguments, "--architecture", "torchvision:squeezenet1_1") == 0


def test_nothing_is_offered_where_nothing_fits(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}, path)
    source = Source("a", path, "a.pt")
    assert guess.find_fitting(source) == []
    told = guess.describe_assumption("torchvision:resnet18", True, [source])
    assert told.endswith("was assumed: --architecture names another")
    assert guess.describe_assumption("model.py:Tiny", False, [source]) == ""
    torch.save(resnet18(num_classes=7).state_dict(), path)
    assert guess.find_fitting(source) == ["torchvision:resnet18"]


def test_an_architecture_is_not_blamed_for_what_a_file_holds(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "setup_config.json").unlink()
    state = squeezenet1_1(num_classes=10).state_dict()
    other = {key: value + 1 for key, value in state.items()}
    lora = {f"base.{key}": value for key, value in state.items()} | {"base.lora_A.weight": torch.ones(2)}
    for name, value in (("two.pt", {"model": state, "ema": other}), ("whole.pt", [state]), ("lora.pt", lora)):
        project.save(name, value)
        assert project.run("tiny", "--members", name, "--handler", "resnet_handler.py") == 1
        assert "architecture" not in capsys.readouterr().err


def test_a_shard_alone_is_named(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model-00001-of-00002.safetensors"
    (project.folder / name).write_bytes(b"")
    assert project.run("tiny", "--members", name) == 1
    assert f"member '{name}': one shard of a checkpoint in several files" in capsys.readouterr().err


# --- batching by default, and loaded once ----------------------------------------------------------------------


def test_requests_are_batched_without_a_file_of_ones_own(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.run("tiny") == 0
    assert read(project, "model-config.yaml") == yaml.safe_load(DEFAULT)
    assert read(project, "MAR-INF/MANIFEST.json")["model"]["configFile"] == "model-config.yaml"
    assert "batches of up to 16 after at most 5 ms, workers: 1" in capsys.readouterr().out
    assert describe_worker({}) == "batches of up to 1 after at most 100 ms, workers: one per core"
    project.block(model_config="bad.yaml")
    (project.folder / "bad.yaml").write_text("- a\n")
    assert project.run("tiny", "--force") == 1
    assert "bad.yaml: expected keys such as batchSize, got list" in capsys.readouterr().err


def test_what_no_worker_could_load_is_not_built(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.run("tiny") == 0
    before = project.mar.read_bytes()
    project.block(input_shape=[4])  # the network takes 3 numbers
    assert project.run("tiny", "--force", check=True) == 1
    error = capsys.readouterr().err
    assert error.startswith("archive: tiny.mar: load: ")
    assert len(error.splitlines()) == 1
    assert project.mar.read_bytes() == before
    assert project.leftovers() == ["tiny.mar"]
    assert project.run("tiny", "--force") == 0  # --no-check


def test_the_choice_of_the_build_spares_the_first_start(project: Project, tmp_path: Path, monkeypatch) -> None:
    project.block(execution="auto")
    assert project.run("tiny", check=True) == 0
    with zipfile.ZipFile(project.mar) as archive:
        (choice,) = [name for name in archive.namelist() if name.startswith("choices/")]
    stored = read(project, choice)
    assert stored["key"]["examples"] == [[[1, 3]], [[16, 3]]]
    # A worker of another user, on the same kind of machine, with nothing kept.
    monkeypatch.setattr("vmap_ensemble.starting.CACHE", tmp_path / "nothing")
    stored["settled"] = True
    folder = project.unpack()
    (folder / choice).write_text(json.dumps(stored))
    ensemble = Ensemble.load(folder, batch_sizes=(16,))
    if stored["key"]["threads"] == torch.get_num_threads():
        assert "measured at an earlier start" in ensemble.execution.reason
        assert ensemble.execution.name == stored["name"]
    (folder / choice).write_text("{}")
    monkeypatch.setattr("vmap_ensemble.starting.CACHE", tmp_path / "nothing else")
    assert "earlier start" not in Ensemble.load(folder, batch_sizes=(16,)).execution.reason


def choices_in(project: Project) -> dict[str, dict]:
    """Choice -> what was measured, of the archive."""
    with zipfile.ZipFile(project.mar) as archive:
        names = [name for name in archive.namelist() if name.startswith("choices/")]
        assert len(set(names)) == len(names)
        return {name: json.loads(archive.read(name)) for name in names}


def test_tuning_adds_the_choice_of_this_kind_of_machine_and_drops_no_other(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.block(execution="auto")
    assert project.run("tiny", "--tune", check=True) == 0  # it isn't there, so it is built and tuned
    (own,) = choices_in(project)
    before, identity = read(project, "members.json"), identify(project.unpack())

    # As another kind of machine would have left it, and of this one an outdated choice.
    folder = tmp_path / "unpacked"
    other = {**read(project, own), "name": "eager"}
    other["key"]["device"]["cpu"]["name"] = "another"
    (folder / "choices/execution-0123456789abcdef.json").write_text(json.dumps(other))
    (folder / own).write_text("{}")
    write_mar(project.mar, folder)
    (tmp_path / "m0.pt").unlink()  # no member is needed: it is measured as it is
    assert project.run("tiny", "--tune", check=True) == 0
    found = choices_in(project)
    assert set(found) == {own, "choices/execution-0123456789abcdef.json"}
    assert found["choices/execution-0123456789abcdef.json"] == other
    assert found[own]["key"]["device"]["cpu"] == cpu_kind()
    assert found[own]["settled"] or found[own]["measurements"] == MOST_MEASUREMENTS
    assert project.leftovers() == ["tiny.mar"]
    assert "tuned" in capsys.readouterr().out
    assert read(project, "members.json") == before
    shutil.rmtree(folder)
    assert identify(project.unpack()) == identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "top_k=1"), "archive: tiny.mar: --set: --tune measures the archive that is there; --force builds"),
        ((), "archive: tiny.mar: --tune: nothing to choose: eager: asked for"),
    ],
)
def test_what_can_not_be_tuned_stays_as_it_is(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    project.block(execution="eager")
    assert project.run("tiny") == 0
    before = project.mar.read_bytes()
    assert project.run("tiny", "--tune", *arguments, check=True) == 1
    assert capsys.readouterr().err.startswith(message)
    assert project.mar.read_bytes() == before
    assert project.leftovers() == ["tiny.mar"]


def test_a_choice_that_a_busy_machine_made_is_measured_once_more_when_tuning(tmp_path: Path, monkeypatch) -> None:
    settled = iter([False, True, True])
    budgets = []

    def run_child(name, stage, request, tell, debug, variables, budget_s):
        budgets.append(budget_s)
        folder = Path(variables["XDG_CACHE_HOME"]) / "vmap-ensemble/execution"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "execution-a.json").write_text(json.dumps({"settled": next(settled), "run": len(budgets)}))
        tell({"phase": "execution", "detail": "eager: why"})

    monkeypatch.setattr(check, "_run_child", run_child)
    assert check.load_stage("a.mar", tmp_path, budget_s=9.0) == "eager: why"
    assert budgets == [9.0, 9.0]
    assert json.loads((tmp_path / "choices/execution-a.json").read_text())["run"] == 2
    check.load_stage("a.mar", tmp_path)
    assert budgets[2:] == [None]


def test_a_device_that_is_not_here_is_said(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (project.folder / "gpu.yaml").write_text("batchSize: 8\nhandler:\n  device: cuda:0\n")
    project.block(model_config="gpu.yaml")
    assert project.run("tiny", check=True) == 0
    assert "cuda:0 isn't on this machine" in capsys.readouterr().out.replace("\n", " ")


def test_an_archive_that_ends_its_process_is_one_line(project: Project) -> None:
    assert project.run("tiny") == 0
    folder = project.unpack()
    (folder / "tiny_handler.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(ArchiveError, match=r"tiny\.mar: the process ended with 3"):
        load_stage("tiny.mar", folder)
