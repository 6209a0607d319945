"""benchmarks.report: README and pages agree with the results, plots are drawn; benchmarks.all keeps files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as everything
from benchmarks import report
from benchmarks.options import RIVALS
from benchmarks.reporting import names, pages
from benchmarks.reporting.results import ROOT, Result, chip_slug, read_results
from benchmarks.reporting.tables import Table, make_tables

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 2,
    "torch": "2.12",
    "python": "3.11",
    "time": "2026-01-02T00:00:00",
}


def timed(rival: str, median: float, p10: float, p90: float, equal: bool = True) -> dict[str, Any]:
    times = {"median_ms": median, "p10_ms": p10, "p90_ms": p90}
    return {"rival": rival, **times, "ratio": 4 / median, "times_roofline": 2 * median, "equal": equal}


LOOP, OURS = timed("loop", 4.0, 4.0, 5.0), timed("ours_auto", 2.0, 1.0, 4.0)
STOCK = timed("stock_vmap", 8.0, 8.0, 8.0, equal=False)
GONE = {"rival": "openvino", "left_out": "ImportError: <no> module"}
CELL = {"network": "net", "members": 2, "batch": 1, "rows": [LOOP, STOCK, OURS, GONE]}


def result(job: str, table: str, **figures: Any) -> Result:
    figures = {"machine": MACHINE, **figures}
    return Result(f"{job}-some-cpu-2-cores", job, f"python -m benchmarks.{table}", table, figures)


def served(rival: str, per_s: float, **row: Any) -> dict[str, Any]:
    facts = {"handler": "mnist", "members": 4, "rival": rival, "requests_per_s": per_s}
    latencies = {"p50_ms": 5.0, "p90_ms": 6.0, "p99_ms": None}
    return {
        **facts,
        **latencies,
        "errors": {"503": 2, "TimeoutError": 1},
        "worker_mib": 100.0,
        "java_mib": 50.0,
        **row,
    }


FORWARD = result("forward", "forward", cells=[CELL])
SEEDS = result("seeds", "seeds", cells=[{**CELL, "published_ratio": 17.0, "published_on": "a GPU"}])
SERVE = result(
    "serve",
    "serve",
    rivals={"ours": "one archive"},
    setting={"clients": [8], "batch_size": 8, "delay_ms": 5},
    rows=[
        served("separate", 10.0, clients=8), served("ours", 20.0, clients=8, rate_ratio=2.0),
        served("ours", 7.0, rate=7.0), {"handler": "mnist", "members": 4, "rival": "workflow", "left_out": "why"},
    ],
)  # fmt: skip
TIMES = {"median_ms": 2.0, "p10_ms": 1.0, "p90_ms": 3.0}
SCALING = result(
    "scaling",
    "scaling",
    networks=[{
        "network": "net", "batch": 1,
        "rows": [
            {"members": count, "loop": TIMES, "ours": TIMES, "peak_mib": 9.0, "stack_mib": 1.0} for count in (1, 2)
        ],
        "fits": {
            key: {"slope": 1.5, "intercept": 0.0, "r2": 1.0}
            for key in ("loop_ms", "ours_ms", "stack_mib", "rss_mib", "peak_mib")
        },
    }],
)  # fmt: skip
BERT = result(
    "bert",
    "bert",
    members=4,
    batches=[{
        "batch": "ragged", "tokens": 136, "texts": 8,
        "rows": [{**timed("vmap, our rules, packed", 2.0, 1.0, 3.0), "ratio": 4.0, "largest_difference": 1e-7}],
    }],
    trunk=[{
        "heads": 16, "texts": 1,
        "rows": [{**timed("16 heads on one trunk, ours", 2.0, 1.0, 3.0), "ratio": 4.0, "largest_difference": 1e-7}],
    }],
)  # fmt: skip
LOADING = result(
    "loading",
    "loading",
    members=8,
    architecture="resnet18",
    phases_s={"import": 1.0, "first_request": 0.5},
    stack_mib=3.0,
    peak_mib=4.0,
    bound_mib=5.0,
)


def judged(score: str, auroc: float) -> dict[str, Any]:
    ends = {"least_auroc": auroc - 0.1, "greatest_auroc": auroc + 0.1, "least_found": 0.1, "greatest_found": 0.9}
    return {"score": score, "auroc": auroc, "found": 0.25, **ends, "curve": [0.0, 0.5, 1.0]}


INFORMATION = {"count": 4, "histogram": [1, 3], "p10_nats": 0.1, "median_nats": 0.2, "p90_nats": 0.3}
UNCERTAINTY = result(
    "uncertainty",
    "uncertainty",
    members=5,
    trained={"epochs": 3, "images": 60},
    member_accuracy=0.5,
    ensemble_accuracy=0.75,
    false_alarms=0.05,
    threshold_nats=0.25,
    edges_nats=[0.01, 0.1, 1.0],
    false_alarm_grid=[0.0, 0.5, 1.0],
    digits={"inputs": "digits", **INFORMATION},
    unlike=[{
        "inputs": "noise: of digits", **INFORMATION,
        "scores": [judged("mutual_information", 0.75), judged("member_probability", 0.8)],
    }],
)  # fmt: skip


# --- the repository's own -----------------------------------------------------------------------------------


def test_readme_agrees_with_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"
    assert "agree with the results" in capsys.readouterr().out


def test_every_result_has_its_command_page_and_plot() -> None:
    jobs = {job.name: job for job in everything.JOBS}
    kept = read_results()
    assert kept
    texts = {page.name: (report.PAGE_FOLDER / page.file).read_text(encoding="utf-8") for page in pages.PAGES}
    for one in kept:
        (page,) = (page.name for page in pages.PAGES if one.job in page.jobs)
        assert one.command == jobs[one.job].command, f"{one.name}: made by another command; python -m benchmarks.all"
        assert one.table == jobs[one.job].table
        assert one.name == f"{one.job}-{chip_slug(one.figures['machine'])}"
        assert f"](../plots/{one.name}.png)" in texts[page]
        assert f"    {one.command}\n" in texts[page]
        assert f"On {one.machine}, from" in texts[page]
        for table in make_tables([one]):
            assert table.cells_to_markdown() in texts[page], f"{one.name}: run python -m benchmarks.report"


def test_every_job_has_one_page() -> None:
    jobs = [job for page in pages.PAGES for job in page.jobs]
    assert sorted(jobs) == sorted(job.name for job in everything.JOBS)


def test_every_rival_is_explained() -> None:
    index = report.INDEX.read_text(encoding="utf-8")
    assert set(RIVALS) == set(names.FORWARD)
    for name, text in (*names.FORWARD.values(), *names.TEXTS.values(), *names.SCORES.values()):
        assert f"| {name} | {text} |" in index
    for one in read_results():
        if one.table == "serve":
            assert set(one.figures["rivals"]) == set(names.SERVED)
            assert all(f"| {names.SERVED[key]} | {text} |" in index for key, text in one.figures["rivals"].items())


def test_docs_name_every_table() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for job in everything.JOBS:
        assert f"`python -m {job.arguments.split()[0]}" in text


# --- tables -------------------------------------------------------------------------------------------------


def test_forward_table_shows_slower_and_missing_cells() -> None:
    (table,) = make_tables([FORWARD])
    assert table.head[4:] == ("ours: auto", "its time / roofline", "stock vmap", "OpenVINO")
    assert table.rows[0][3:] == ("4.00 ms", "**2.00**", "4.0x", "0.50 (differs)", "-")


def test_serve_table_shows_errors_and_what_was_left_out() -> None:
    (table,) = make_tables([SERVE])
    assert table.rows[1] == (
        "4", "**ours**", "8 clients", "20.0", "5 ms", "-", "2 503, 1 TimeoutError", "100 MiB", "50 MiB",
    )  # fmt: skip
    assert table.rows[2][2] == "7.0/s arrive"
    assert table.rows[3][3] == "left out: why"


def test_scaling_and_seeds_tables() -> None:
    scaling, seeds = make_tables([SEEDS, SCALING])
    assert scaling.rows[0][:4] == ("net", "1 to 2", "1.50 ms", "1.50 ms")
    assert seeds.rows[0] == ("net", "0.50 (differs)", "**2.00**", "17")
    assert "other hardware" in seeds.note


def test_readme_block_has_ratios_and_the_missing_gpu() -> None:
    block = report.readme_block([FORWARD, SERVE, SEEDS])
    assert "| net | 2 | 1 | 4.00 ms | 0.50 | - | **2.00** | 4.0 |" in block
    assert "| MNIST | 4 | **ours** | 20.0 (2.00x) | 5 ms | - | 3 | 100 MiB |" in block
    alt = "Serving: a real TorchServe under load, on Some CPU, 2 cores"
    assert f"![{alt}](docs/plots/serve-some-cpu-2-cores.png)" in block
    assert "[ResNet-18](docs/benchmarks/resnet18.md)" in block
    assert "GPU: not yet measured." in block
    with_gpu = result("seeds", "seeds", cells=[])
    with_gpu.figures["machine"] = {**MACHINE, "gpu": "Big GPU"}
    assert report.gpu_note([FORWARD, with_gpu]) == "GPU: Big GPU."
    assert chip_slug(with_gpu.figures["machine"]) == "big-gpu"


def test_block_goes_between_the_markers() -> None:
    begin, end = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
    readme = f"a\n{begin}\nold\n{end}\nb"
    new = report.replace_block(Path("a.md"), readme, "results", "new \\1")
    assert new == f"a\n{begin}\n\nnew \\1\n\n{end}\nb"
    with pytest.raises(SystemExit, match=r"a\.md: expected .* around the results, once"):
        report.replace_block(Path("a.md"), "no markers", "results", "new")


def test_bars_and_tags_in_cells_are_text() -> None:
    table = Table("t", ("h",), [("a | <b>",)], "c", "m")
    assert table.cells_to_markdown().endswith("| a \\| &lt;b> |")


def test_uncertainty_table_has_every_score_and_says_which_is_best() -> None:
    scores, information = make_tables([UNCERTAINTY])
    assert scores.rows == [
        ("noise: of digits", "mutual information", "0.750", "25.0%", ""),
        ("noise: of digits", "1 - probability, one member", "0.800", "25.0%", "AUROC 0.700 to 0.900"),
    ]
    assert "Largest AUROC of *noise: of digits*: 1 - probability, one member." in scores.note
    assert information.rows[1] == ("noise: of digits", "4", "0.1000", "0.2000", "0.3000")
    assert "noise: of digits 0.750." in report.uncertainty_block([FORWARD, UNCERTAINTY])
    assert report.uncertainty_block([FORWARD]) == ""


def test_pages_have_parts_by_chip_or_the_command_to_run() -> None:
    other = Result(
        "forward-resnet18-b", "forward-resnet18", "python -m b", "forward",
        {"machine": {**MACHINE, "cpu": "Other"}, "cells": [CELL]},
    )  # fmt: skip
    first = Result("forward-resnet18-a", "forward-resnet18", "python -m a", "forward", FORWARD.figures)
    texts = pages.write_pages([first, other])
    assert set(texts) == {page.file for page in pages.PAGES}
    page = texts["resnet18.md"]
    assert (
        page.index("# ResNet-18: one forward") < page.index("## Some CPU, 2 cores") < page.index("## Other, 2 cores")
    )
    assert "](../plots/forward-resnet18-b.png)" in page
    assert "Not measured yet. This measures it:\n\n    python -m benchmarks.loading" in texts["loading.md"]


def test_check_names_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ROOT", "PAGE_FOLDER", "PLOT_FOLDER"):
        monkeypatch.setattr(report, name, tmp_path)
    page, stray = tmp_path / "page.md", tmp_path / "stray.md"
    page.write_text("old")
    stray.write_text("of no result")
    monkeypatch.setattr(report, "read_results", lambda folder: [FORWARD])
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "write_texts", lambda results: {page: "new"})
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert said == "page.md, forward-some-cpu-2-cores.png, stray.md: run python -m benchmarks.report\n"


def test_bert_tables_hold_batches_and_the_trunk() -> None:
    first, second = make_tables([BERT])
    name = "**ours: eager, no padding**"
    assert first.rows == [("ragged: 136 tokens in 8 texts", name, "2.00 ms", "1.00 to 3.00", "4.00", "1e-07")]
    assert (second.title, second.rows[0][0]) == ("16 heads on one trunk", "1 texts")


# --- drawing and running ------------------------------------------------------------------------------------


def test_plots_of_all_tables_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.reporting.plots import draw_plots

    shown = [FORWARD, SERVE, SEEDS, SCALING, BERT, LOADING, UNCERTAINTY]
    paths = draw_plots(shown, tmp_path)
    assert [path.name for path in paths] == [f"{one.name}.png" for one in shown]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_lines_go_from_p10_to_p90_and_auto_is_marked() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.reporting import plots

    assert plots.speeds_of([OURS], 4.0) == ([2.0], [[1.0], [2.0]])  # p90 of 4 ms is 1x, p10 of 1 ms is 4x
    figure = plots.plot_forward(FORWARD.figures)
    (axes,) = figure.axes
    edges = [bar.get_edgecolor()[3] for bar in axes.patches]
    assert edges == [0, 0, 1]
    labels = {label.get_text(): label.get_fontweight() for label in axes.get_yticklabels()}
    assert labels == {"loop": "normal", "stock vmap": "normal", "ours: auto": "bold"}
    (lines,) = (kept for kept in axes.collections)
    spans = [segment[:, 0].tolist() for segment in lines.get_segments()]
    assert spans == [[0.8, 1.0], [0.5, 0.5], [1.0, 4.0]]
    assert figure.legends[0].get_texts()[0].get_text() == "ours: auto, served by default"


def test_a_job_keeps_its_figures_and_a_failed_one_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "FOLDER", tmp_path)
    script = tmp_path / "fake.py"
    script.write_text(
        'import sys; open(sys.argv[-1], "w").write(\'{"machine": {}, "n": 1}\'); sys.exit(int(sys.argv[1]))'
    )
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    assert everything.run_job(everything.Job("good", "seeds", "fake 0"), "chip") == 0
    kept = json.loads((tmp_path / "good-chip.json").read_text())
    assert kept == {"job": "good", "command": "python -m fake 0", "table": "seeds", "machine": {}, "n": 1}
    (tmp_path / "bad-chip.json").write_text("old")
    assert everything.run_job(everything.Job("bad", "seeds", "fake 1"), "chip") == 1
    assert (tmp_path / "bad-chip.json").read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


def test_commands_of_all_jobs_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert everything.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(everything.JOBS)
    assert all(line.startswith("python -m benchmarks.") for line in lines)
