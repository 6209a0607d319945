"""benchmarks.forward, scaling and seeds: counts, fits and rows, and each command run on the smallest network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.forward
import benchmarks.scaling
import benchmarks.seeds
from benchmarks.measuring import measure, networks, roofline
from benchmarks.measuring.measure import Timing
from benchmarks.measuring.rivals import Call, Rivals
from benchmarks.runs import forward, scaling, seeds
from training.runs.mnist_data import SAMPLE_DIR, load_digits

QUICK = ["--seconds", "0.05", "--threads", "1"]


@pytest.fixture
def tiny_encoder() -> networks.Network:
    return networks.encoder_network("tiny", layers=1, hidden=24, tokens=5)


# --- roofline -----------------------------------------------------------------------------------------------


def test_work_of_a_linear_layer_is_counted() -> None:
    work = roofline.count_work(nn.Linear(10, 4, bias=False), (torch.randn(3, 10),), members=2)
    assert work.flops == 2 * 2 * 3 * 10 * 4
    assert work.bytes == 4 * (2 * (10 * 4 + 3 * 4) + 3 * 10)


def test_embeddings_are_read_by_row() -> None:
    embedding = nn.Embedding(1000, 8)
    assert roofline.read_bytes(embedding, tokens=3) == 3 * 8 * 4
    assert roofline.read_bytes(embedding, tokens=5000) == networks.parameter_bytes(embedding) == 1000 * 8 * 4


def test_bound_is_whichever_takes_longer() -> None:
    ceilings = roofline.Ceilings(bytes_per_s=1e9, flops_per_s=1e9)
    assert roofline.Work(flops=2e6, bytes=1e6).bound_ms(ceilings) == pytest.approx(2.0)
    told = roofline.Work(flops=1e6, bytes=3e6).to_json(ceilings)
    assert (told["bound_ms"], told["limited_by"]) == (pytest.approx(3.0), "memory")


def test_ceilings_are_measured() -> None:
    ceilings = roofline.measure_ceilings(torch.device("cpu"), elements=2**16, side=64, repeats=2)
    assert 1e7 < ceilings.bytes_per_s < 1e13
    assert 1e7 < ceilings.flops_per_s < 1e14
    assert roofline.Ceilings(1.0, 4.0).best(roofline.Ceilings(2.0, 3.0)) == roofline.Ceilings(2.0, 4.0)


# --- networks and rivals ------------------------------------------------------------------------------------


def test_trained_members_leave_zeros_behind_their_relus() -> None:
    network, seen = networks.NETWORKS["mnist-trained"], []
    with torch.inference_mode():
        (member,) = networks.build_members(network, 1)
        member.fc1.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        (images,) = network.make_args(64)
        predicted = member(images).argmax(1)
    assert images.shape == (64, 1, 28, 28)
    labels = load_digits(SAMPLE_DIR, "test").labels[:64]
    assert (predicted == labels).float().mean() > 0.8
    assert (seen[0] == 0).float().mean() > 0.6


def test_members_differ_and_repeat() -> None:
    first, second = networks.build_members(networks.NETWORKS["mnist"], 2)
    again = networks.build_members(networks.NETWORKS["mnist"], 1)[0]
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, second.fc1.weight)


def test_members_of_a_benchmark_share_nothing(tmp_path: Path) -> None:
    """Biases of 0 and scales of 1 are equal in fresh networks, which would flatter whoever computes them once."""
    built = networks.build_members(networks.NETWORKS["resnet18"], 2)
    members = Rivals(
        networks.NETWORKS["resnet18"], built, networks.NETWORKS["resnet18"].make_args(1), tmp_path
    ).members
    assert members.shared == {}


@pytest.mark.parametrize("name", ["stock_vmap", "ours_eager", "ours_auto"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_encoder_rivals_equal_the_loop(name: str, count: int, tiny_encoder: networks.Network, tmp_path: Path) -> None:
    members = networks.build_members(tiny_encoder, count)
    rivals = Rivals(tiny_encoder, members, tiny_encoder.make_args(3), tmp_path)
    with torch.inference_mode():
        want = torch.stack([member(*rivals.args).logits for member in members])
        assert want.shape == (count, 3, 2)
        torch.testing.assert_close(rivals.loop()(), want)
        torch.testing.assert_close(getattr(rivals, name)()(), want, rtol=1e-4, atol=1e-5)


def test_native_code_of_an_encoder_is_left_out_with_the_reason(
    tiny_encoder: networks.Network, tmp_path: Path
) -> None:
    rivals = Rivals(tiny_encoder, networks.build_members(tiny_encoder, 2), tiny_encoder.make_args(1), tmp_path)
    _, _, left_out = forward.build_calls(rivals, ["ours_ahead_of_time"])
    assert "no native code: PackedEncoderForward is more than one call of vmap" in left_out["ours_ahead_of_time"]


def test_batch_statistics_are_a_members_own() -> None:
    network = networks.vary_statistics(nn.Sequential(nn.BatchNorm2d(4)))
    assert network[0].running_mean.abs().max() > 0
    assert not torch.equal(network[0].running_var, torch.ones(4))


def test_rows_have_ratio_roofline_and_verdict() -> None:
    timings = [Timing(name, 3, ms, ms, ms, ms) for name, ms in (("loop", 4.0), ("ours_auto", 2.0))]
    notes = {"ours_auto": "eager"}
    loop, ours = forward.make_rows(timings, {"loop": 0.0, "ours_auto": float("nan")}, 1e-4, notes)
    cell = {"work": {"flops": 1e6, "bytes": 0.0}, "rows": [loop, ours, {"left_out": "why"}]}
    roofline.add_roofline(cell, roofline.Ceilings(bytes_per_s=1e9, flops_per_s=1e9))
    assert (ours["ratio"], ours["times_roofline"], ours["note"]) == (2.0, 2.0, "eager")
    assert (loop["equal"], ours["equal"]) == (True, False)


def test_versions_name_what_is_missing() -> None:
    versions = measure.describe_versions("torch", "no-such-package")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["no-such-package"] == "not installed"


# --- commands -----------------------------------------------------------------------------------------------


def test_forward_writes_its_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "forward.json"
    only = ["--only", "stock_vmap", "ours_prepared", "openvino"]
    assert (
        benchmarks.forward.main(
            ["--model", "mnist", "--members", "2", "--batch", "1", "2", *only, *QUICK, "--json", str(file)]
        )
        == 0
    )
    figures = json.loads(file.read_text())
    assert figures["table"] == "forward"
    assert [(cell["members"], cell["batch"]) for cell in figures["cells"]] == [(2, 1), (2, 2)]
    assert figures["cells"][1]["work"]["flops"] == 2 * figures["cells"][0]["work"]["flops"]
    for cell in figures["cells"]:
        measured = {row["rival"]: row for row in cell["rows"] if "left_out" not in row}
        assert {"loop", "stock_vmap", "ours_prepared"} <= set(measured)
        for row in measured.values():
            assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["largest_relative_difference"] <= 1e-5
            assert row["ratio"] == pytest.approx(measured["loop"]["median_ms"] / row["median_ms"])
            assert row["times_roofline"] == pytest.approx(row["median_ms"] / cell["work"]["bound_ms"])
    assert "GFLOP/s" in capsys.readouterr().out


def test_a_rival_with_other_numbers_gives_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Rivals.stock_vmap

    def build_wrong(self: Rivals) -> Call:
        call = right(self)
        return lambda: call() * 1.01

    monkeypatch.setattr(Rivals, "stock_vmap", build_wrong)
    assert benchmarks.forward.main(["--model", "mnist", "--members", "2", "--only", "stock_vmap", *QUICK]) == 1
    assert "stock_vmap differs by" in capsys.readouterr().err


def test_a_rival_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: Rivals) -> None:
        raise RuntimeError("no such thing\nhere")

    monkeypatch.setattr(Rivals, "openvino", fail)
    file = tmp_path / "forward.json"
    assert (
        benchmarks.forward.main(
            ["--model", "mnist", "--members", "1", "--only", "openvino", *QUICK, "--json", str(file)]
        )
        == 0
    )
    rows = json.loads(file.read_text())["cells"][0]["rows"]
    assert rows[-1] == {"rival": "openvino", "left_out": "RuntimeError: no such thing"}


def test_half_precision_is_held_to_its_own_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not MNIST: a CPU without instructions for bfloat16 takes minutes for its convolutions.
    tiny = networks.Network("tiny", lambda: nn.Linear(16, 4).eval(), lambda batch: (torch.randn(batch, 16),))
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny)
    monkeypatch.setattr(benchmarks.forward, "NETWORKS", ["tiny"])
    file = tmp_path / "forward.json"
    only = ["--only", "stock_vmap", "ours_cudagraph"]
    options = ["--model", "tiny", "--members", "2", "--dtype", "bf16", *only, *QUICK, "--json", str(file)]
    assert benchmarks.forward.main(options) == 0
    (cell,) = json.loads(file.read_text())["cells"]
    assert (cell["dtype"], cell["device"]) == ("bf16", "cpu")
    assert cell["work"]["bytes"] == pytest.approx(2 * 2 * (16 * 4 + 4), rel=0.3)
    assert "expected the members on a CUDA device" in cell["rows"][-1]["left_out"]


def test_a_cell_beyond_the_memory_is_left_out() -> None:
    cell = forward.Cell(networks.NETWORKS["mnist"], 10**7, 1)
    found = forward.compare_rivals(cell, ["stock_vmap"], 0.1)
    assert "GiB of memory" in found["left_out"]
    assert found["rows"] == []
    forward.print_cell(found)


def test_line_is_fitted() -> None:
    assert scaling.fit_line([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx({"slope": 2.0, "intercept": 1.0, "r2": 1.0})
    assert scaling.fit_line([1, 2, 3], [1.0, 2.0, 1.0])["r2"] == pytest.approx(0.0)


def test_stacks_are_the_members() -> None:
    members = scaling.stack_one_by_one(networks.NETWORKS["mnist"], 2)
    for index, network in enumerate(networks.build_members(networks.NETWORKS["mnist"], 2)):
        for key, value in network.state_dict().items():
            assert torch.equal(members.stacked[key][index], value)


def test_scaling_writes_times_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    assert benchmarks.scaling.main(["--model", "mnist", "--members", "1", "4", *QUICK, "--json", str(file)]) == 0
    (table,) = json.loads(file.read_text())["networks"]
    one, four = table["rows"]
    assert four["stack_mib"] == pytest.approx(4 * one["stack_mib"], rel=0.01)
    assert four["peak_mib"] >= four["rss_mib"] * 0.99 > 100
    assert table["fits"]["stack_mib"]["slope"] == pytest.approx(one["stack_mib"], rel=0.01)
    assert four["largest_relative_difference"] <= 1e-5


def test_scaling_wants_two_sizes() -> None:
    with pytest.raises(SystemExit):
        benchmarks.scaling.main(["--model", "mnist", "--members", "4", "4"])


def test_seeds_are_beside_what_was_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seeds.json"
    assert benchmarks.seeds.main(["--settings", "mnist", *QUICK, "--json", str(file)]) == 0
    (cell,) = json.loads(file.read_text())["cells"]
    assert (cell["members"], cell["batch"], cell["published_ratio"]) == (2, 1, 17.0)
    assert "not the same hardware" in capsys.readouterr().out
    assert {name: published for name, (_, published) in seeds.SETTINGS.items()} == {
        "mnist": 17.0, "resnet18": 15.7, "bert": 1.79,
    }  # fmt: skip
    assert seeds.SETTINGS["resnet18"][0].make_args(1)[0].shape == (1, 3, 720, 720)
    assert seeds.SETTINGS["bert"][0].make_args(1)[0].shape == (1, 10)
