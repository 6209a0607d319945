"""benchmarks.report: README and results agree, the page stands alone, plots are drawn; benchmarks.all keeps files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as everything
from benchmarks import report
from benchmarks.reporting import results
from benchmarks.reporting.results import ROOT, Result, chip_slug, make_tables, read_results

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 2,
    "torch": "2.12",
    "python": "3.11",
    "time": "2026-01-02T00:00:00",
}
LOOP = {"rival": "loop", "median_ms": 4.0, "ratio": 1.0, "times_roofline": 8.0, "equal": True}
OURS = {"rival": "ours_auto", "median_ms": 2.0, "ratio": 2.0, "times_roofline": 4.0, "equal": True}
STOCK = {"rival": "stock_vmap", "median_ms": 8.0, "ratio": 0.5, "times_roofline": 16.0, "equal": False}
GONE = {"rival": "openvino", "left_out": "ImportError: <no> module"}
CELL = {"network": "net", "members": 2, "batch": 1, "rows": [LOOP, STOCK, OURS, GONE]}


def result(job: str, table: str, **figures: Any) -> Result:
    figures = {"machine": MACHINE, **figures}
    return Result(f"{job}-some-cpu-2-cores", job, f"python -m benchmarks.{table}", table, figures)


def served(rival: str, per_s: float, **row: Any) -> dict[str, Any]:
    facts = {"handler": "mnist", "members": 4, "rival": rival, "requests_per_s": per_s, "p50_ms": 5.0, "p99_ms": None}
    return {**facts, "errors": {"503": 2, "TimeoutError": 1}, "worker_mib": 100.0, "java_mib": 50.0, **row}


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


# --- the repository's own -----------------------------------------------------------------------------------


def test_readme_agrees_with_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"
    assert "agrees" in capsys.readouterr().out


def test_every_result_has_its_command_and_plot() -> None:
    jobs = {job.name: job for job in everything.JOBS}
    kept = read_results()
    assert kept
    page = report.PAGE.read_text()
    for one in kept:
        assert one.command == jobs[one.job].command, f"{one.name}: made by another command; python -m benchmarks.all"
        assert one.table == jobs[one.job].table
        assert one.name == f"{one.job}-{chip_slug(one.figures['machine'])}"
        for table in make_tables([one]):
            assert report.table_to_html(table) in page, f"{one.name}: run python -m benchmarks.report"


def test_the_page_refers_to_nothing_outside() -> None:
    page = report.PAGE.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)


def test_docs_name_every_table() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for job in everything.JOBS:
        assert f"`python -m {job.arguments.split()[0]}" in text


# --- tables -------------------------------------------------------------------------------------------------


def test_forward_table_shows_slower_and_missing_cells() -> None:
    (table,) = make_tables([FORWARD])
    assert table.head[4:] == ("stock vmap", "ours auto", "openvino", "ours auto: time / roofline")
    assert table.rows[0][3:] == ("4.00 ms", "0.50 (differs)", "2.00", "-", "4.0x")


def test_serve_table_shows_errors_and_what_was_left_out() -> None:
    (table,) = make_tables([SERVE])
    assert table.rows[1] == (
        "4", "ours", "8 clients", "20.0", "5 ms", "-", "2 503, 1 TimeoutError", "100 MiB", "50 MiB",
    )  # fmt: skip
    assert table.rows[2][2] == "7.0/s arrive"
    assert table.rows[3][3] == "left out: why"


def test_scaling_and_seeds_tables() -> None:
    scaling, seeds = make_tables([SEEDS, SCALING])
    assert scaling.rows[0][:4] == ("net", "1 to 2", "1.50 ms", "1.50 ms")
    assert seeds.rows[0] == ("net", "0.50 (differs)", "2.00", "17")
    assert "other hardware" in seeds.note


def test_readme_block_has_ratios_and_the_missing_gpu() -> None:
    block = report.readme_block([FORWARD, SERVE, SEEDS])
    assert "| net | 2 | 1 | 4.00 ms | 0.50 | - | **2.00** | 4.0 |" in block
    assert "| mnist | 4 | **ours** | 20.0 (2.00x) | 5 ms | - | 3 | 100 MiB |" in block
    assert "![serve-some-cpu-2-cores](docs/plots/serve-some-cpu-2-cores.png)" in block
    assert "GPU: not yet measured." in block
    with_gpu = result("seeds", "seeds", cells=[])
    with_gpu.figures["machine"] = {**MACHINE, "gpu": "Big GPU"}
    assert report.gpu_note([FORWARD, with_gpu]) == "GPU: Big GPU."
    assert chip_slug(with_gpu.figures["machine"]) == "big-gpu"


def test_block_goes_between_the_markers() -> None:
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nb"
    assert report.replace_block(readme, "new \\1") == f"a\n{report.BEGIN}\n\nnew \\1\n\n{report.END}\nb"
    with pytest.raises(SystemExit, match="around the results, once"):
        report.replace_block("no markers", "new")


def test_html_is_escaped() -> None:
    table = results.Table("<t>", ("<h>",), [("<c>",)], "a & b", "m")
    text = report.table_to_html(table)
    assert "<td>&lt;c&gt;</td>" in text
    assert "a &amp; b" in text


def test_bert_tables_hold_batches_and_the_trunk() -> None:
    row = {
        "rival": "packed",
        "median_ms": 2.0,
        "p10_ms": 1.0,
        "p90_ms": 3.0,
        "ratio": 4.0,
        "largest_difference": 1e-7,
    }
    batch = {"batch": "ragged", "tokens": 136, "texts": 8, "rows": [row]}
    trunk = [{"heads": 16, "texts": 1, "rows": [row]}]
    first, second = make_tables([result("bert", "bert", members=4, batches=[batch], trunk=trunk)])
    assert first.rows == [("ragged: 136 tokens in 8 texts", "packed", "2.00 ms", "1.00 to 3.00", "4.00", "1e-07")]
    assert (second.title, second.rows[0][0]) == ("16 heads on one trunk", "1 texts")


# --- drawing and running ------------------------------------------------------------------------------------


def test_plots_are_drawn_and_held_by_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.reporting.plots import draw_plots

    shown = [FORWARD, SERVE, SEEDS, SCALING]
    paths = draw_plots(shown, tmp_path)
    assert [path.name for path in paths] == [f"{one.name}.png" for one in shown]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    assert report.make_page(shown, paths).count("data:image/png;base64,") == 4


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
