"""benchmarks/results/*.json -> plots (docs/plots/), pages (docs/benchmarks/) and the README's tables.

    python -m benchmarks.report            # --check: say whether texts agree with the results, write nothing

Everything that is shown comes from those files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from benchmarks.reporting.names import AUTO, SERVED, name_network, name_rival, rivals_table
from benchmarks.reporting.pages import PAGES, list_pages, write_pages
from benchmarks.reporting.results import FOLDER, ROOT, Result, gpu_note, read_results
from benchmarks.reporting.tables import Table, bold_ours

README, INDEX = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PLOT_FOLDER, PAGE_FOLDER = ROOT / "docs" / "plots", ROOT / "docs" / "benchmarks"
# What the README shows the plot of, if it is there; the pages have all.
README_PLOTS = ("serve", "forward-resnet18", "scaling")
COMMAND = "python -m benchmarks.all"
OTHERS = ("loop_compiled", "onnxruntime_per_member", "onnxruntime_one_graph", "openvino")


def readme_block(results: list[Result]) -> str:
    """What stands between the README's two markers: main tables, plots, and whether a GPU was measured."""
    parts = [table.to_markdown() for table in (*summarise_forward(results), *summarise_serve(results))]
    for job in README_PLOTS:
        parts += [show_plot(result) for result in results if result.job == job]
    pages = " · ".join(f"[{page.title.partition(':')[0]}](docs/benchmarks/{page.file})" for page in PAGES)
    more = (
        "What the rivals are, how it is measured and how to repeat it: [benchmarks](docs/benchmarks.md). Every "
        f"table, slower cells too, with its command: {pages}."
    )
    return "\n\n".join([*parts, f"{gpu_note(results)} {more}"])


def uncertainty_block(results: list[Result]) -> str:
    """The README's plot of uncertainty, with what it shows."""
    parts = []
    for result in results:
        if result.job == "uncertainty":
            kinds = "; ".join(
                f"{kind['inputs']} {next(row['auroc'] for row in kind['scores']):.3f}"
                for kind in result.figures["unlike"]
            )
            parts += [
                show_plot(result),
                f"{result.figures['members']} members trained on digits see digits of the test set and inputs that "
                f"are none. AUROC of their mutual information: {kinds}. Predictive entropy and single members beside "
                "it, and how it was measured: [uncertainty](docs/benchmarks/uncertainty.md).",
            ]
    return "\n\n".join(parts)


def show_plot(result: Result) -> str:
    """An image of the README, which says what it shows."""
    title = next(page.title for page in PAGES if result.job in page.jobs)
    return f"![{title}, on {result.chip_and_cores}](docs/plots/{result.name}.png)"


def summarise_forward(results: list[Result]) -> list[Table]:
    """One table per machine over all files of `forward`: the loop, stock vmap, the best of the others, ours."""
    rows_of: dict[str, list[tuple[str, ...]]] = {}
    for result in results:
        if result.table == "forward":
            rows_of.setdefault(result.chip, []).extend(
                _forward_row(cell) for cell in result.figures["cells"] if cell["rows"]
            )
    head = ("network", "N", "batch", "loop", "stock vmap", "best of the others", "ours: auto", "time / roofline")
    note = (
        "Speeds, the loop being 1. The others: the compiled loop, ONNX Runtime and OpenVINO. Roofline: the least "
        "time that the plain arithmetic and all weights need, at ceilings measured in the same run; below 1 is had "
        "by fewer multiplications (Winograd) and by leaving out the weights that meet a 0. *Trained, digits* has "
        "such zeros, as what is served has; *MNIST, 28x28* is the same network with random weights on noise."
    )
    return [Table("One forward of N members", head, rows, COMMAND, chip, note) for chip, rows in rows_of.items()]


def _forward_row(cell: dict[str, Any]) -> tuple[str, ...]:
    measured = {row["rival"]: row for row in cell["rows"] if "left_out" not in row}
    others = [row for name, row in measured.items() if name in OTHERS]
    best = max(others, key=lambda row: row["ratio"], default=None)
    ours = measured.get(AUTO)
    return (
        name_network(cell["network"]), str(cell["members"]), str(cell["batch"]),
        f"{measured['loop']['median_ms']:.2f} ms",
        f"{measured['stock_vmap']['ratio']:.2f}" if "stock_vmap" in measured else "-",
        f"{best['ratio']:.2f} ({name_rival(best['rival'])})" if best else "-",
        f"**{ours['ratio']:.2f}**" if ours else "-", f"{ours['times_roofline']:.1f}" if ours else "-",
    )  # fmt: skip


def summarise_serve(results: list[Result]) -> list[Table]:
    """One table per machine over all files of `serve`: the closed loops."""
    rows_of: dict[str, list[tuple[str, ...]]] = {}
    notes: dict[str, str] = {}
    for result in results:
        if result.table == "serve":
            setting = result.figures["setting"]
            own = [row for row in result.figures["rows"] if "clients" in row]
            rows_of.setdefault(result.chip, []).extend(map(_serve_row, own))
            notes[result.chip] = (
                f"{', '.join(map(str, setting['clients']))} clients, each sending when it was answered; the same "
                f"batchSize ({setting['batch_size']}), delay and threads for all. *separate models*: N registered "
                "models, of which the client asks all."
            )
    head = ("model", "N", "served as", "requests/s", "p50", "p99", "unanswered", "memory of the workers")
    title = "A real TorchServe under load"
    return [Table(title, head, rows, COMMAND, chip, notes[chip]) for chip, rows in rows_of.items()]


def _serve_row(row: dict[str, Any]) -> tuple[str, ...]:
    name = bold_ours(SERVED.get(row["rival"], row["rival"]))
    ratio = f" ({row['rate_ratio']:.2f}x)" if "rate_ratio" in row else ""
    latencies = ("-" if row[key] is None else f"{row[key]:.0f} ms" for key in ("p50_ms", "p99_ms"))
    return (
        name_network(row["handler"]), str(row["members"]), name, f"{row['requests_per_s']:.1f}{ratio}", *latencies,
        str(sum(row["errors"].values())), f"{row['worker_mib']:.0f} MiB",
    )  # fmt: skip


def replace_block(path: Path, text: str, name: str, block: str) -> str:
    """Put a block between its two markers in a file's text.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}: written by python -m benchmarks.report -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{path.name}: expected {begin!r} and {end!r} around the {name}, once")
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", text)


def write_texts(results: list[Result]) -> dict[Path, str]:
    """Every file of text that shows results -> what it should hold: README, docs/benchmarks.md and its pages."""
    served: dict[str, str] = {}
    for result in results:
        served |= result.figures["rivals"] if result.table == "serve" else {}
    readme = replace_block(README, README.read_text(encoding="utf-8"), "results", readme_block(results))
    index = replace_block(INDEX, INDEX.read_text(encoding="utf-8"), "pages", list_pages())
    return {
        README: replace_block(README, readme, "uncertainty", uncertainty_block(results)),
        INDEX: replace_block(INDEX, index, "rivals", rivals_table(served)),
        **{PAGE_FOLDER / name: text for name, text in write_pages(results).items()},
    }


def find_outdated(texts: dict[Path, str], results: list[Result]) -> list[Path]:
    """Files that differ from what they should hold, plots that are missing, and pages and plots of no result."""
    plots = {PLOT_FOLDER / f"{result.name}.png" for result in results}
    outdated = [path for path, text in texts.items() if not path.is_file() or path.read_text("utf-8") != text]
    outdated += [path for path in sorted(plots) if not path.is_file()]
    return outdated + find_strays(texts, plots)


def find_strays(texts: Container[Path], plots: Container[Path]) -> list[Path]:
    """Pages and plots that no result needs any more."""
    return [
        path
        for path in (*PAGE_FOLDER.glob("*.md"), *PLOT_FOLDER.glob("*.png"))
        if path not in texts and path not in plots
    ]


def main(arguments: list[str] | None = None) -> int:
    """Write plots, pages and README; with --check only compare, 1 where one is out of date."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.report", description="Draw what the results say."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or a page differs")
    options = parser.parse_args(arguments)
    results = read_results(FOLDER)
    if not results:
        print(f"error: {FOLDER.relative_to(ROOT)} holds no results: python -m benchmarks.all", file=sys.stderr)
        return 2
    texts = write_texts(results)
    if options.check:
        outdated = [str(path.relative_to(ROOT)) for path in find_outdated(texts, results)]
        print(
            f"{', '.join(outdated)}: run python -m benchmarks.report" if outdated
            else f"README.md and {len(texts) - 1} pages agree with the results"
        )  # fmt: skip
        return 1 if outdated else 0
    from benchmarks.reporting.plots import draw_plots  # matplotlib, which a check doesn't need

    plots = draw_plots(results, PLOT_FOLDER)
    PAGE_FOLDER.mkdir(exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for path in find_strays(texts, plots):
        path.unlink()
    print(f"wrote {len(plots)} plots, {len(texts) - 1} pages and {README.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
