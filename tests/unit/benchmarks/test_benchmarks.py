"""The comparison scripts, run briefly, and the way they measure."""

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import benchmarks.batching_rules
import benchmarks.mnist_vmap
import benchmarks.precision
import benchmarks.resnet_vmap
from benchmarks import draw_sample_image
from benchmarks.measuring import int8_engines, measure, vmap_comparison
from benchmarks.options import SAMPLE_DIGIT, SAMPLE_IMAGE
from benchmarks.runs import batching_rules, mnist_vmap
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.encoders.batching_rules import RULES
from vmap_ensemble.encoders.packing import take_first
from vmap_ensemble.models.mnist import MnistNet

BRIEFLY = ["--iterations", "3", "--warmup", "1", "--threads", "1", "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "member.pt"
    torch.save(MnistNet().state_dict(), path)
    return path


# --- measuring ----------------------------------------------------------------------------------------------


def test_rivals_take_turns_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WAKE_S", 0.0)
    order: list[str] = []
    rivals = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = measure.measure_interleaved(rivals, CPU, warmup=2, iterations=5, block=2)
    assert "".join(order) == "aabb" + "aabb" + "bbaa" + "ab"
    assert [(t.name, t.calls) for t in timings] == [("a", 5), ("b", 5)]


def test_calls_in_the_first_milliseconds_of_a_block_are_not_counted() -> None:
    calls = {"short": 0, "long": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    rivals = {"short": lambda: run("short", 0.002), "long": lambda: run("long", 2 * measure.WAKE_S)}
    short, long = measure.measure_interleaved(rivals, CPU, warmup=1, iterations=4, block=2)
    assert short.calls == long.calls == 4
    assert calls["short"] >= 1 + 4 + 2 * 3  # a sleep may take longer than asked for
    assert calls["long"] == 1 + 4


def test_a_slower_rival_is_measured_slower() -> None:
    rivals = {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.02)}
    fast, slow = measure.measure_interleaved(rivals, CPU, warmup=0, iterations=3)
    assert fast.median_ms >= 1
    assert slow.median_ms >= 20
    assert slow.median_ms > fast.median_ms


def test_summary_of_known_times() -> None:
    timing = measure.summarise("x", [float(value) for value in range(1, 12)] + [1000.0])
    assert timing.median_ms == 6.5
    assert timing.mean_ms == pytest.approx(1066 / 12)
    assert timing.p10_ms == pytest.approx(2.1)
    assert timing.p90_ms == pytest.approx(10.9)
    assert measure.summarise("one", [4.0]).p90_ms == 4.0


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"iterations": 0}, {"block": 0}])
def test_senseless_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected a rival, warmup of 0 or more"):
        measure.measure_interleaved({"a": lambda: None}, CPU, **wrong)


def test_machine_is_described() -> None:
    machine = measure.describe_machine(CPU)
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()


# --- comparing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 5])
def test_mnist_comparison_writes_its_figures(members: int, checkpoint: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "out.json"
    arguments = [*BRIEFLY, "--num_models", str(members), "--model_path", str(checkpoint), "--json", str(file)]
    assert benchmarks.mnist_vmap.main([*arguments, "--batch_size", "2"]) == 0
    figures = json.loads(file.read_text())
    assert figures["num_models"] == members
    assert figures["batch_size"] == 2
    assert figures["difference"]["equal"] is True
    assert 0 <= figures["difference"]["largest_relative_difference"] <= 1e-5
    loop, ours = figures["timings"]
    assert (loop["name"], ours["name"]) == ("one after another", "vmapped ensemble")
    assert loop["calls"] == ours["calls"] == 3
    assert figures["ratio_of_medians"] == pytest.approx(loop["median_ms"] / ours["median_ms"])
    printed = capsys.readouterr().out
    assert f"3.png -> {figures['prediction']['label']}, probability" in printed
    assert f"{figures['ratio_of_medians']:.2f}x" in printed


def test_sanity_prediction_is_the_plain_models(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    benchmarks.mnist_vmap.main([*BRIEFLY, "--num_models", "1", "--model_path", str(checkpoint), "--json", str(file)])
    model = MnistNet().eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    pixels = torch.tensor(list(Image.open(SAMPLE_DIGIT).tobytes())).reshape(1, 1, 28, 28)
    with torch.no_grad():
        expected, label = model((pixels / 255 - 0.1307) / 0.3081).exp()[0].max(0)
    prediction = json.loads(file.read_text())["prediction"]
    assert prediction["label"] == str(int(label))
    assert prediction["probability"] == pytest.approx(expected.item(), rel=1e-5)


def test_resnet_comparison_runs_on_perturbed_copies(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": resnet18().state_dict()}, tmp_path / "resnet.pth")
    file = tmp_path / "out.json"
    assert (
        benchmarks.resnet_vmap.main([*BRIEFLY, "--model_path", str(tmp_path / "resnet.pth"), "--json", str(file)])
        == 0
    )
    figures = json.loads(file.read_text())
    assert figures["network"] == "resnet18"
    assert figures["members"] == "resnet.pth and 1 perturbed copies"
    assert figures["difference"]["largest_relative_difference"] <= 1e-5
    assert "sample.jpg ->" in capsys.readouterr().out


def test_perturbed_copies_differ_and_repeat() -> None:
    state = resnet18().state_dict()
    first, again, other = (vmap_comparison.perturb(state, seed) for seed in (1, 1, 2))
    assert torch.equal(first["conv1.weight"], again["conv1.weight"])
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(first["bn1.running_var"], state["bn1.running_var"])
    change = (first["fc.weight"] - state["fc.weight"]).std() / state["fc.weight"].std()
    assert change == pytest.approx(vmap_comparison.PERTURBATION, rel=0.05)


def test_members_that_differ_from_the_ensemble_give_exit_1(monkeypatch, capsys) -> None:
    right = EnsembleForward.__call__
    monkeypatch.setattr(EnsembleForward, "__call__", lambda self, x: right(self, x) * 1.001)
    monkeypatch.setattr(mnist_vmap, "SUBJECT", fresh_subject())
    assert benchmarks.mnist_vmap.main(BRIEFLY) == 1
    assert "differs from its members beyond the tolerance" in capsys.readouterr().err


def fresh_subject() -> vmap_comparison.Subject:
    """The MNIST subject on a machine where nothing was trained."""
    subject = mnist_vmap.SUBJECT
    return vmap_comparison.Subject(**{**vars(subject), "model_path": None})


def test_nan_never_counts_as_equal() -> None:
    nan = torch.full((1, 1, 2), float("nan"))
    assert vmap_comparison.compare_outputs(nan, torch.ones(1, 1, 2))["equal"] is False


def test_fresh_members_are_told_to_mean_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(mnist_vmap, "SUBJECT", fresh_subject())
    assert benchmarks.mnist_vmap.main(BRIEFLY) == 0
    assert "seeded fresh weights, not trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus: torch can't use it here"),
        (["--image_path", "missing.png"], "--image_path missing.png: expected a picture"),
        (["--model_path", "missing.pt"], "missing.pt: expected a checkpoint or a folder of them"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(arguments: list[str], message: str, capsys) -> None:
    assert benchmarks.mnist_vmap.main([*BRIEFLY, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--num_models", "--iterations", "--threads", "--batch_size"])
def test_senseless_counts_are_wrong_usage(option: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmarks.mnist_vmap.main([*BRIEFLY, option, "0"])
    assert f"{option}: expected 1 or more, got 0" in capsys.readouterr().err


def test_checkpoint_of_another_network_is_refused(tmp_path: Path, capsys) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    assert benchmarks.mnist_vmap.main([*BRIEFLY, "--model_path", str(tmp_path / "linear.pt")]) == 2
    assert "member '0-linear' does not fit MnistNet" in capsys.readouterr().err


def test_unknown_architecture_is_refused(capsys) -> None:
    assert benchmarks.resnet_vmap.main([*BRIEFLY, "--architecture", "resnet19"]) == 2
    assert "--architecture resnet19: expected one of" in capsys.readouterr().err


def test_drawn_picture_is_the_one_in_the_repository() -> None:
    drawn = torch.frombuffer(bytearray(draw_sample_image.draw_landscape().tobytes()), dtype=torch.uint8)
    kept = torch.frombuffer(bytearray(Image.open(SAMPLE_IMAGE).tobytes()), dtype=torch.uint8)
    assert (drawn.int() - kept.int()).abs().float().mean() < 6  # JPEG loses the grain


# --- batching rules -----------------------------------------------------------------------------------------

RULES_BRIEFLY = [
    *("--iterations", "2", "--warmup", "0", "--threads", "1"),
    *("--num_models", "2", "--repeat", "2", "--batches", "single"),
]


def test_every_rule_has_a_line_in_the_table(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(batching_rules, "VOCABULARY", 50)
    used = set()
    for function, rule in RULES.items():
        monkeypatch.setitem(RULES, function, lambda *a, f=function, r=rule, **k: (used.add(f), r(*a, **k))[1])
    file = tmp_path / "rules.json"
    assert benchmarks.batching_rules.main([*RULES_BRIEFLY, "--json", str(file)]) == 0
    assert used == set(RULES)
    rows = json.loads(file.read_text())["rows"]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["equal"] is True
        assert max(row["largest_relative_difference"], row["of_stock"]) <= 1e-5
        assert row["stock_by_ours"] == pytest.approx(row["stock"]["median_ms"] / row["ours"]["median_ms"])
        assert row["loop_by_ours"] == pytest.approx(row["loop"]["median_ms"] / row["ours"]["median_ms"])
        assert f"| {row['rule']} | {row['calls']} | single | {row['stock']['median_ms']:.2f} (" in printed
    assert {"attention, packed", "unpack", "first tokens"} < {row["rule"] for row in rows}


def test_cases_run_what_a_model_runs() -> None:
    lengths = [3, 1, 2]
    cases = {case.name: case for case in batching_rules.make_cases(2, lengths)}
    for case in cases.values():
        reference = case.stock_asked(case.stock.looped(1))
        got = case.ours_asked(case.ours.vmapped(3))
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)
    assert cases["unpack"].stock.looped(1).shape == (2, 3, 3, batching_rules.WIDTH)
    packed = cases["attention, packed"]
    assert packed.ours.vmapped(1).shape[2] == sum(lengths)
    assert packed.stock.looped(1).shape[3] == max(lengths)


def test_a_rule_that_gives_other_numbers_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(batching_rules, "VOCABULARY", 50)
    monkeypatch.setattr(batching_rules, "take_first", lambda row, packing: take_first(row, packing) * 1.001)
    assert benchmarks.batching_rules.main(RULES_BRIEFLY) == 1
    assert "differs from the loop beyond the tolerance: first tokens (single)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        benchmarks.batching_rules.main([*RULES_BRIEFLY, "--repeat", "0"])
    assert "--repeat: expected 1 or more, got 0" in capsys.readouterr().err


# --- precision ----------------------------------------------------------------------------------------------


def test_precisions_are_judged_and_timed(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    # The engines of others have tests of their own.
    monkeypatch.setattr(int8_engines, "find_spec", lambda package: None)
    path = tmp_path / "figures.json"
    arguments = ["--members", str(checkpoint), "--data-dir", "sample", "--batch", "1", "--seconds", "0.1"]
    assert benchmarks.precision.main([*arguments, "--markdown", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    rows = {row["name"]: row for row in figures["accuracy"]}
    assert rows["fp32"]["changed"] == 0
    assert rows["fp32"]["largest"] == 0.0
    assert 0 < rows["int8"]["largest"] < 0.05
    assert rows["int8"]["images"] == 2000
    assert abs(rows["int8"]["accuracy"] - rows["fp32"]["accuracy"]) <= rows["int8"]["changed"] / 2000
    times = figures["times"]["1"]
    assert {timing["name"] for timing in times["timings"]} >= {"fp32 loop", "fp32 prepared", "int8"}
    assert times["agreement"]["fp32 prepared"]["largest"] < 1e-5 < times["agreement"]["int8"]["largest"]
    out = capsys.readouterr().out
    assert "| int8 |" in out
    assert "int8 OpenVINO is left out: openvino and nncf not installed" in out


def test_checkpoints_of_other_models_can_not_be_judged(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmarks.precision.main(["--model", "resnet18", "--members", "a.pt"])
    assert stop.value.code == 2
    assert "--members are MNIST checkpoints" in capsys.readouterr().err
