"""benchmarks/results/*.json -> plots (docs/plots/), one HTML page (docs/benchmarks.html) and the README's tables.

    python -m benchmarks.report            # --check: say whether the README agrees with the results, write nothing

Everything that is shown comes from those files. The page holds its plots and refers to nothing outside itself.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.reporting.results import FOLDER, ROOT, Result, Table, gpu_note, make_tables, read_results

README, PLOT_FOLDER, PAGE = ROOT / "README.md", ROOT / "docs" / "plots", ROOT / "docs" / "benchmarks.html"
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
# What the README shows the plot of, if it is there; the page has all.
README_PLOTS = ("serve", "forward-resnet18", "scaling")
COMMAND = "python -m benchmarks.all"
OTHERS = ("loop_compiled", "onnxruntime_per_member", "onnxruntime_one_graph", "openvino")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
td, th { border: 1px solid #ccc; padding: 3px 8px }
th { background: #f2f4f6; text-align: left } img { max-width: 100% } code { background: #f2f4f6; padding: 1px 4px }
p.source { color: #555; font-size: 13px }
"""


def readme_block(results: list[Result]) -> str:
    """What stands between the README's two markers: main tables, plots, and whether a GPU was measured."""
    parts = [table.to_markdown() for table in (*summarise_forward(results), *summarise_serve(results))]
    for job in README_PLOTS:
        shown = [result.name for result in results if result.job == job]
        parts += [f"![{name}](docs/plots/{name}.png)" for name in shown]
    more = (
        "Every table with its command, slower cells too: [docs/benchmarks.html](docs/benchmarks.html), made from the "
        "files in `benchmarks/results`; how to repeat them: [docs/benchmarks.md](docs/benchmarks.md)."
    )
    return "\n\n".join([*parts, f"{gpu_note(results)} {more}"])


def summarise_forward(results: list[Result]) -> list[Table]:
    """One table per machine over all files of `forward`: the loop, stock vmap, the best of the others, ours."""
    rows_of: dict[str, list[tuple[str, ...]]] = {}
    for result in results:
        if result.table == "forward":
            rows_of.setdefault(result.chip, []).extend(
                _forward_row(cell) for cell in result.figures["cells"] if cell["rows"]
            )
    head = ("network", "N", "batch", "loop", "stock vmap", "best of the others", "ours (`auto`)", "time / roofline")
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
    ours = measured.get("ours_auto")
    return (
        cell["network"], str(cell["members"]), str(cell["batch"]), f"{measured['loop']['median_ms']:.2f} ms",
        f"{measured['stock_vmap']['ratio']:.2f}" if "stock_vmap" in measured else "-",
        f"{best['ratio']:.2f} ({best['rival'].replace('_', ' ')})" if best else "-",
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
                f"batchSize ({setting['batch_size']}), delay and threads for all. *separate*: N registered models, "
                "of which the client asks all; *loop*: a handler that loops; *workflow*: TorchServe's own."
            )
    head = ("model", "N", "served as", "requests/s", "p50", "p99", "unanswered", "memory of the workers")
    title = "A real TorchServe under load"
    return [Table(title, head, rows, COMMAND, chip, notes[chip]) for chip, rows in rows_of.items()]


def _serve_row(row: dict[str, Any]) -> tuple[str, ...]:
    name = f"**{row['rival']}**" if row["rival"] == "ours" else row["rival"]
    ratio = f" ({row['rate_ratio']:.2f}x)" if "rate_ratio" in row else ""
    latencies = ("-" if row[key] is None else f"{row[key]:.0f} ms" for key in ("p50_ms", "p99_ms"))
    return (
        row["handler"], str(row["members"]), name, f"{row['requests_per_s']:.1f}{ratio}", *latencies,
        str(sum(row["errors"].values())), f"{row['worker_mib']:.0f} MiB",
    )  # fmt: skip


def replace_block(readme: str, block: str) -> str:
    """Put the block between the markers.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise SystemExit(f"README.md: expected {BEGIN!r} and {END!r} around the results, once")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{block}\n\n{END}", readme)


def make_page(results: list[Result], plots: list[Path]) -> str:
    """The HTML page: every table, every plot as data."""
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots}
    body = ["<h1>Benchmarks</h1>", f"<p>{html.escape(gpu_note(results))} Slower cells are shown, too.</p>"]
    for result in results:
        if result.name in images:
            alt = html.escape(result.table)
            body.append(f'<h2>{html.escape(result.name)}</h2><img alt="{alt}" src="data:image/png;base64,')
            body[-1] += images[result.name] + '">'
        body += [table_to_html(table) for table in make_tables([result])]
    text = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vmap-ensemble: benchmarks</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{text}\n</body></html>\n"
    )


def table_to_html(table: Table) -> str:
    """One table with its title, note and source."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join([line(table.head, "th"), *(line(row, "td") for row in table.rows)])
    source = f"<code>{html.escape(table.command)}</code> on {html.escape(table.machine)}. {html.escape(table.note)}"
    return f'<h3>{html.escape(table.title)}</h3>\n<table>\n{rows}\n</table>\n<p class="source">{source}</p>'


def main(arguments: list[str] | None = None) -> int:
    """Write plots, page and README; with --check only compare, 1 where the README is out of date."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.report", description="Draw what the results say."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the README differs")
    options = parser.parse_args(arguments)
    results = read_results(FOLDER)
    if not results:
        print(f"error: {FOLDER.relative_to(ROOT)} holds no results: python -m benchmarks.all", file=sys.stderr)
        return 2
    old = README.read_text(encoding="utf-8")
    new = replace_block(old, readme_block(results))
    if options.check:
        print("README.md agrees with the results" if new == old else "README.md: run python -m benchmarks.report")
        return 0 if new == old else 1
    from benchmarks.reporting.plots import draw_plots  # matplotlib, which a check doesn't need

    plots = draw_plots(results, PLOT_FOLDER)
    PAGE.write_text(make_page(results, plots), encoding="utf-8")
    README.write_text(new, encoding="utf-8")
    print(f"wrote {len(plots)} plots, {PAGE.relative_to(ROOT)} and {README.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
