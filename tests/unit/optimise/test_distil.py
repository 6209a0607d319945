"""vmap-ensemble distil: losses against plain torch, tiny students, runs that go on, the gate, bad input."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from archiver.__main__ import main as archive_command
from archiver.command import main as command
from archiver.packing.pack import RESERVED_NAMES
from optimise.distil import losses
from optimise.distil.command import main
from optimise.distil.students import HeadsStudent, OneStudent, last_module, train_mode
from optimise.distil.train import Recipe, Training
from optimise.errors import OptimiseError
from optimise.examples import change as augment
from optimise.gate.report import ROWS, Column, Limits, as_markdown, reason_against
from optimise.output.write import write_block
from tests.conftest import write_archive
from tests.unit.optimise.conftest import HANDLER, MODEL, NAMES, batch_of, draw, tiny
from vmap_ensemble.ensemble import Ensemble

ROOT = Path(__file__).resolve().parents[3]
OTHERS = """
class Small(nn.Module):
    inputs, classes = 64, 3
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(self.inputs, self.classes)
    def forward(self, x):
        return self.fc(x.flatten(1))
class Wrong(Small):
    inputs = 9
class Wide(Small):
    classes = 4
"""


def distil(archive: Path, data: Path, output: Path, *more: str) -> int:
    short = [] if "--epochs" in more else ["--epochs", "3"]
    free = [] if "--max-accuracy-loss" in more else ["--max-accuracy-loss", "1", "--max-nll-loss", "9"]
    return main([str(archive), "--data", str(data), "--output", str(output), *short, *free, *more])


def states_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


# --- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_are_hintons_by_plain_torch(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    got = losses.soft_target_loss(student.log_softmax(-1), teacher.log_softmax(-1), temperature)
    wanted = (teacher / temperature).softmax(-1)
    terms = wanted * (wanted.log() - (student / temperature).log_softmax(-1))
    torch.testing.assert_close(got, terms.sum(-1).mean() * temperature**2)


def test_labels_count_where_there_are_any() -> None:
    torch.manual_seed(0)
    said, teacher = torch.randn(2, 4, 3).log_softmax(-1), torch.randn(2, 4, 3).log_softmax(-1)
    labels = torch.tensor([0, losses.UNLABELLED, 2, 1])
    known = torch.tensor([0, 2, 3])
    plain = torch.stack([F.cross_entropy(head[known], labels[known]) for head in said]).mean()
    torch.testing.assert_close(losses.label_loss(said, labels), plain)
    soft = losses.soft_target_loss(said, teacher, 2.0)
    torch.testing.assert_close(losses.joint_loss(said, teacher, labels, 2.0, 0.25), 0.75 * soft + 0.25 * plain)
    none = torch.full((4,), losses.UNLABELLED)
    torch.testing.assert_close(losses.joint_loss(said, teacher, none, 2.0, 0.25), soft)
    assert losses.label_loss(said, none) == 0


def test_heads_and_gradients_equal_the_plain_loop() -> None:
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(6, 1, 8, 8)
    student = HeadsStudent(model, ("a", "b"), ["fc"])
    with torch.no_grad():
        getattr(student, "head/fc/weight")[1] += 0.1
    student.eval()
    loop = []
    for state in student.states().values():
        alone = tiny().eval()
        alone.load_state_dict(state)
        loop.append(alone(x))
    got = student(x)
    torch.testing.assert_close(got, torch.stack(loop))
    got.square().sum().backward()
    assert getattr(student, "head/fc/weight").grad.shape == (2, 3, 36)
    features = model.norm(model.conv(x)).relu().flatten(1)
    expected = torch.einsum("mbc,bf->mcf", 2 * got.detach(), features)
    torch.testing.assert_close(getattr(student, "head/fc/weight").grad, expected)
    assert model.fc.weight.grad is None
    assert model.conv.weight.grad is not None


def test_training_drops_nothing_and_keeps_the_members_means() -> None:
    torch.manual_seed(0)
    one, model = OneStudent(tiny(), "s"), tiny()
    model.load_state_dict(one.model.state_dict())
    heads, x = HeadsStudent(model, ("a", "b"), ["fc"]), torch.randn(6, 1, 8, 8)
    plain = model.eval()(x)
    torch.testing.assert_close(train_mode(one)(x)[0], plain)
    torch.testing.assert_close(train_mode(heads)(x), plain.expand(2, -1, -1))
    assert int(heads.model.norm.num_batches_tracked) == 0
    anew = OneStudent(tiny(), "s", learns_statistics=True)
    train_mode(anew)(x)
    expected = 0.1 * anew.model.conv(x).mean((0, 2, 3))
    torch.testing.assert_close(anew.model.norm.running_mean, expected)


def test_the_last_layer_is_the_head_and_others_are_refused() -> None:
    model = tiny().eval()
    assert last_module(model, torch.zeros(2, 1, 8, 8)) == "fc"
    with pytest.raises(OptimiseError, match="has no module 'head'; it has conv, norm, fc"):
        HeadsStudent(model, ("a", "b"), ["head"])
    with pytest.raises(OptimiseError, match="expected a part of the parameters"):
        HeadsStudent(model, ("a", "b"), ["conv", "norm", "fc"])


def test_a_step_towards_disagreement_has_its_size_and_direction() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.randn(4, 6)
    torch.manual_seed(1)
    got = augment.seek_disagreement(x, lambda batch: layer(batch).log_softmax(-1), 0.5)
    step = got - x
    torch.testing.assert_close(step.square().mean(1).sqrt(), torch.full((4,), 0.5) * x.std())
    torch.manual_seed(1)
    direction = torch.rand(4, 3) * 2 - 1
    moving = x.clone().requires_grad_()
    (direction * layer(moving).log_softmax(-1)).sum().backward()
    torch.testing.assert_close(F.normalize(step), F.normalize(moving.grad))


def test_changed_examples_keep_their_shape_and_follow_the_seed() -> None:
    for shape in ((5, 2, 7, 9), (5, 6)):
        x = torch.rand(shape)
        found = []
        for _ in range(2):
            torch.manual_seed(3)
            found.append(augment.change(x))
        assert found[0].shape == x.shape
        assert torch.equal(*found)
        assert not torch.equal(found[0], x)


def test_the_rate_goes_up_and_falls_to_nothing() -> None:
    rates = [Recipe(learning_rate=1.0).rate(step, 100) for step in range(100)]
    assert rates[4] == 1.0 == max(rates)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


# --- whole runs --------------------------------------------------------------------------------------------------


def test_one_student_reaches_its_teacher(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "student"
    assert distil(archive, photos, output, "--epochs", "12", "--held-out", "0.2") == 0
    shown = capsys.readouterr().out
    assert "agreement with the ensemble" in shown
    table = as_markdown(json.loads((output / "report.json").read_text())).splitlines()
    assert table[0] == "|  | mean member | ensemble | student |"
    assert {row.split("|")[1].strip() for row in table[2:]} <= set(ROWS)
    page = (output / "report.html").read_text()
    assert all(figure in page for figure in ("agreement with the ensemble", "Loss by epoch", "accepted"))
    assert "script" not in page
    assert len(page) < 50_000
    assert f"pack it: ./archive.sh ens_one --config {output / 'setup_config.json'}" in shown
    report = json.loads((output / "report.json").read_text())
    assert report["student"]["accuracy"] >= report["ensemble"]["accuracy"] - 0.05
    assert report["student"]["parameters"] * 3 == pytest.approx(report["ensemble"]["parameters"], rel=0.01)
    assert report["labels"] == "given"
    assert report["history"][-1][1] < report["history"][0][1]
    assert sorted(states_in(output)) == ["student"]
    # The same numbers as by asking the written checkpoint, without any of the code above.
    model = tiny().eval()
    model.load_state_dict(states_in(output)["student"])
    x, y = batch_of(300, 77)
    with torch.no_grad():
        own = (model(x).argmax(1) == y).float().mean()
    teacher = (Ensemble.load(archive).probabilities(x).argmax(1) == y).float().mean()
    assert own >= teacher - 0.05
    assert teacher > 0.6


def test_heads_share_a_trunk_in_their_archive_and_differ(archive: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    unlike = tmp_path / "unlike"
    unlike.mkdir()
    for index in range(40):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(unlike / f"{index}.png")
    assert (
        distil(archive, photos, output, "--to", "heads", "--epochs", "8", "--lr", "0.01", "--unlike", str(unlike))
        == 0
    )
    states = states_in(output)
    assert list(states) == ["m0", "m1", "m2"]
    for key, tensor in states["m0"].items():
        same = torch.equal(tensor, states["m1"][key])
        assert same == (not key.startswith("fc.")), key
    report = json.loads((output / "report.json").read_text())
    assert report["student"]["mutual_information"] > 0
    assert 0 < report["student"]["auroc"] <= 1
    trunk, head = 40 + 8 + 8 + 1, 111
    assert report["ensemble"]["parameters"] == 3 * (trunk + head)
    assert report["student"]["parameters"] == trunk + 3 * head
    store = tmp_path / "store"
    config = str(output / "setup_config.json")
    assert archive_command(["ens_heads", "--no-check", "--config", config, "--output", str(store)]) == 0
    packed = Ensemble.load(store / "ens_heads.mar")
    assert sorted(packed.forward.members.stacked) == ["fc.bias", "fc.weight"]
    x, _ = batch_of(50, 5)
    outputs = packed.outputs(x)
    loop = []
    for state in states.values():
        model = tiny().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            loop.append(model(x))
    torch.testing.assert_close(outputs, torch.stack(loop), rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    (answer,) = packed.predict([next(photos.rglob("*.png"))])
    assert answer.body["prediction"]["label"] in NAMES
    assert answer.body["uncertainty"]["mutual_information"] >= 0


@pytest.mark.parametrize("to", ["one", "heads"])
def test_a_seed_decides_and_a_killed_run_goes_on(
    archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    assert distil(archive, photos, whole, "--to", to) == 0
    assert distil(archive, photos, other, "--to", to, "--seed", "1") == 0
    plain, calls = Training._run_epoch, []

    def killed(self: Training, step: object) -> float:
        calls.append(self.epoch)
        if len(calls) == 2:
            self._step(torch.arange(8), 0)  # in the middle of an epoch
            raise KeyboardInterrupt
        return plain(self, step)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "_run_epoch", killed)
    assert distil(archive, photos, cut, "--to", to) == 130
    assert not list(cut.glob("*.safetensors"))
    torch.rand(7)
    assert distil(archive, photos, cut, "--to", to) == 0
    assert calls == [0, 1, 1, 2]
    first, second = states_in(whole), states_in(cut)
    assert list(first) == list(second)
    assert all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])
    third = states_in(other)
    assert not all(torch.equal(first[name][key], third[name][key]) for name in first for key in first[name])
    # Once more: all is done.
    assert distil(archive, photos, cut, "--to", to) == 0
    assert len(calls) == 4


def test_the_ensemble_is_asked_once(archive: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    from optimise.examples import teacher

    assert distil(archive, photos, tmp_path / "s", "--augment", "none", "--epochs", "1") == 0
    monkeypatch.setattr(teacher, "_write", lambda *_args: pytest.fail("asked again"))
    assert distil(archive, photos, tmp_path / "s", "--augment", "none", "--epochs", "1") == 0


def test_training_stops_when_the_held_out_loss_no_longer_falls(archive: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "s"
    assert distil(archive, photos, output, "--epochs", "40", "--patience", "1", "--lr", "0.5") == 0
    report = json.loads((output / "report.json").read_text())
    assert report["epochs"] < 40
    assert report["held_out_loss"] == min(loss for _, loss in report["history"])


def test_another_architecture_starts_anew(archive: Path, photos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "ens"
    shutil.copytree(archive, mine)
    (mine / "model.py").write_text(MODEL + OTHERS)
    assert distil(mine, photos, tmp_path / "s", "--architecture", "model.py:Small") == 0
    assert list(states_in(tmp_path / "s")["student"]) == ["fc.bias", "fc.weight"]
    block = json.loads((tmp_path / "s" / "setup_config.json").read_text())["ens_one"]
    assert (block["architecture"], block["model_file"], block["members"]) == (
        "model.py:Small",
        "model.py",
        ["student.safetensors"],
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("Wrong", r"can't take inputs of \[1, 8, 8\]"), ("Wide", "gives 4 classes, the members have 3")],
)
def test_an_architecture_that_does_not_fit(
    archive: Path, photos: Path, tmp_path: Path, capsys, name: str, message: str
) -> None:
    test_another_architecture_starts_anew(archive, photos, tmp_path)
    capsys.readouterr()
    mine = tmp_path / "ens"
    assert distil(mine, photos, tmp_path / "t", "--architecture", f"model.py:{name}") == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "t").exists()


# --- data --------------------------------------------------------------------------------------------------------


def test_tables_unlabelled_folders_and_idx_files(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    files = sorted(photos.rglob("*.png"))[:60]
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in files))
    assert distil(archive, table, tmp_path / "a", "--epochs", "1") == 0
    assert json.loads((tmp_path / "a" / "report.json").read_text())["labels"] == "given"
    lines = tmp_path / "t.jsonl"
    rows = [{"path": str(path), "label": NAMES.index(path.parent.name)} for path in files]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert distil(archive, lines, tmp_path / "b", "--epochs", "1") == 0
    assert json.loads((tmp_path / "b" / "report.json").read_text())["labels"] == "given"
    first, second = states_in(tmp_path / "a"), states_in(tmp_path / "b")
    assert all(torch.equal(tensor, second["student"][key]) for key, tensor in first["student"].items())
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in files:
        shutil.copy(path, flat / path.name)
    (flat / "5.png").write_bytes(b"no image")
    (flat / "zz.png").write_bytes(b"no image")
    assert distil(archive, flat, tmp_path / "c", "--epochs", "1") == 0
    told = capsys.readouterr()
    assert "zz.png: the body is not an image" in told.err
    assert "rows were skipped" in told.err
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert (report["labels"], report["ensemble"]["accuracy"]) == ("the ensemble's own", 1.0)
    assert report["skipped"] in (1, 2)


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        header = struct.pack(f">I{values.ndim}I", 0x0800 | values.ndim, *values.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_idx_files_are_judged_by_their_test_part(archive: Path, tmp_path: Path, capsys) -> None:
    data, random = tmp_path / "idx", np.random.default_rng(1)
    data.mkdir()
    for part, count in (("train", 60), ("t10k", 33)):
        labels = np.arange(count) % 3
        write_idx(data, part, np.stack([draw(label, random) for label in labels]), labels)
    assert distil(archive, data, tmp_path / "s", "--epochs", "1") == 0
    examples = json.loads((tmp_path / "s" / "report.json").read_text())["examples"]
    assert examples == {"learn": 54, "held_out": 6, "test": 33}
    (data / "train-labels-idx1-ubyte.gz").write_bytes(b"x")
    assert distil(archive, data, tmp_path / "t") == 1
    assert "train-labels-idx1-ubyte.gz: can't be read" in capsys.readouterr().err


def _copy(photos: Path, folder: Path, count: int, label: str) -> Path:
    (folder / label).mkdir(parents=True)
    for path in sorted(photos.rglob("*.png"))[:count]:
        shutil.copy(path, folder / label / path.name)
    return folder


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arrange", "more", "message"),
    [
        (lambda _p, f: f / "none", [], "no such file or folder"),
        (lambda _p, f: f, [], "holds no file that ends in"),
        (lambda p, f: _copy(p, f, 3, "cat"), [], "label 'cat': no member knows it; they know bar, blob, dot"),
        (lambda p, f: _copy(p, f, 3, "7"), [], "label '7': no member knows it"),
        (lambda p, f: _copy(p, f, 3, "dot"), [], "3 examples can be read; expected at least 20"),
        (lambda p, f: _write(f / "a.csv", "x,y\n1,2\n"), [], "name the one to be answered: x, y"),
        (lambda p, f: _write(f / "a.csv", "path,y\n1,2\n"), ["--label-column", "kind"], "no column 'kind'"),
        (lambda p, f: _write(f / "a.csv", "path,label\n1,2\n1,cow\n"), [], "a.csv, row 2: label 'cow': no member"),
        (lambda p, f: _write(f / "a.jsonl", "[[1, 2]]\n" * 30), [], r"expected a tensor of shape [1, 8, 8]"),
        (
            lambda p, f: _write(f / "a.jsonl", "nonsense\n" * 30),
            [],
            "no row can be read; the first: 1: expected JSON",
        ),
        (lambda p, f: _copy(p, f, 30, "dot"), ["--to", "heads", "--head", "body"], "has no module 'body'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    archive: Path, photos: Path, tmp_path: Path, capsys, arrange, more: list[str], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    output = tmp_path / "out"
    assert distil(archive, arrange(photos, folder), output, *more) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_what_can_not_be_distilled(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    states = {"only": tiny().state_dict()}
    settings = {"handler": "tiny_handler.py", "architecture": "model.py:Tiny"}
    alone = write_archive(tmp_path / "alone", states, settings)
    for name in ("model.py", "tiny_handler.py"):
        shutil.copy(archive / name, alone)
    assert distil(alone, photos, tmp_path / "s", "--to", "heads") == 1
    assert "has one member; heads need at least two" in capsys.readouterr().err
    own = HANDLER + "    def answers(self, outputs, weights, options, examples):\n        return []\n"
    (alone / "tiny_handler.py").write_text(own)
    assert distil(alone, photos, tmp_path / "s") == 1
    assert "TinyTask" in (error := capsys.readouterr().err) or "TinyHandler" in error
    assert "can't be learnt yet" in error
    assert distil(tmp_path / "none.mar", photos, tmp_path / "s") == 1
    assert "none.mar: no such archive" in capsys.readouterr().err


# --- the gate and the output -------------------------------------------------------------------------------------


def test_the_gate_says_what_is_lost() -> None:
    good, worse = Column(0.9, 0.3, 0.0, 1.0), Column(0.88, 0.5, 0.0, 1.0)
    assert reason_against({"ensemble": good, "student": good}, Limits()) is None
    reason = reason_against({"ensemble": good, "student": worse}, Limits()) or ""
    assert "accuracy 88.00%, the ensemble's 90.00%: 2.00% lost, 1.00% allowed" in reason
    assert "NLL 0.5000, the ensemble's 0.3000: 0.2000 lost, 0.05 allowed" in reason
    assert reason_against({"ensemble": good, "student": worse}, Limits(0.03, 0.3)) is None
    nothing = Column(0.9, float("nan"), 0.0, 1.0)
    assert "NLL nan" in (reason_against({"ensemble": good, "student": nothing}, Limits()) or "")


def test_a_student_that_loses_too_much_is_kept_but_not_packed(
    archive: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "s"
    strict = ["--max-accuracy-loss", "0.01", "--max-nll-loss", "-9", "--epochs", "1"]
    assert distil(archive, photos, output, *strict) == 1
    epoch, error = capsys.readouterr().err.splitlines()
    assert epoch.startswith("distil: epoch 1, held-out loss ")
    assert error.startswith("distil: refused: ")
    assert "-9 allowed (--max-nll-loss)" in error
    assert (output / "student.safetensors").is_file()
    assert not (output / "setup_config.json").exists()
    assert json.loads((output / "report.json").read_text())["accepted"] is False
    assert distil(archive, photos, output, *strict, "--force") == 0  # and is not trained again
    assert (output / "setup_config.json").is_file()


def test_an_output_of_something_else_is_not_continued(archive: Path, photos: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "s"
    assert distil(archive, photos, output, "--epochs", "1") == 0
    assert distil(archive, photos, output, "--epochs", "1", "--to", "heads") == 1
    assert "was made with to 'one', this is 'heads'; --anew begins again" in capsys.readouterr().err
    assert distil(archive, photos, output, "--epochs", "1", "--to", "heads", "--anew") == 0
    assert sorted(states_in(output)) == ["m0", "m1", "m2"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep")
    for more in ([], ["--anew"]):
        assert distil(archive, photos, mine, *more) == 1
        assert "holds files that aren't of a run of this tool" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def test_wrong_usage(capsys) -> None:
    for more, message in (
        (["--epochs", "0"], "--epochs: expected 1 or more"),
        (["--temperature", "0"], "--temperature: expected a number above 0"),
        (["--held-out", "0.9"], "--held-out: expected a share above 0, at most 0.4"),
        (["--label-weight", "2"], "--label-weight: expected a share from 0 to 1"),
        (["--to", "heads", "--architecture", "mnist"], "--architecture: goes with --to one"),
        (["--head", "fc"], "--head: goes with --to heads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(["distil", "ens.mar", "--data", "d", "--output", "o", *more])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        command(["distil", "--help"])
    assert "goes on where it was" in capsys.readouterr().out


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run_as_written(
    archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny archive, under the names that the page has, and with no more than one epoch."""
    page = (ROOT / "docs" / "distil.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}(vmap-ensemble distil model_store/mnist.*|\./archive\.sh .*)$", page, re.M)
    assert len([line for line in lines if line.startswith("vmap")]) >= 2
    monkeypatch.chdir(tmp_path)
    shutil.copytree(archive, tmp_path / "model_store" / "mnist_ens.mar")
    settings = json.loads((archive / "setup_config.json").read_text())
    (tmp_path / "model_store" / "mnist_ens.mar" / "setup_config.json").write_text(
        json.dumps({**settings, "name": "mnist_ens"})
    )
    shutil.copytree(photos, tmp_path / "digits")
    shutil.copytree(photos / "dot", tmp_path / "letters")
    for line in lines:
        name, *arguments = shlex.split(line.split("#")[0])
        if name == "vmap-ensemble":
            assert command([*arguments, "--epochs", "1", "--max-accuracy-loss", "1", "--max-nll-loss", "9"]) == 0
        else:
            assert archive_command([*arguments, "--no-check", "--output", "model_store"]) == 0
    assert list((tmp_path / "model_store").glob("*_heads.mar"))


def test_what_archive_sh_makes_of_the_teachers_members_stays_behind(archive: Path, tmp_path: Path) -> None:
    """A graph or native code of the ensemble would be refused in the student's archive."""
    teacher = shutil.copytree(archive, tmp_path / "teacher")
    for name in RESERVED_NAMES:
        if not (teacher / name).exists():
            (teacher / name).mkdir()
    (teacher / "onnx" / "members.onnx").write_bytes(b"x")
    (teacher / "more.txt").write_text("x")
    (tmp_path / "student").mkdir()
    write_block(
        tmp_path / "student", teacher, "s", {"handler": "mnist_handler.py", "architecture": "mnist"}, ["s.pt"]
    )
    written = {path.name for path in (tmp_path / "student").iterdir()}
    assert "more.txt" in written
    assert not written & (set(RESERVED_NAMES) - {"setup_config.json", "index_to_name.json", "pretrained"})
