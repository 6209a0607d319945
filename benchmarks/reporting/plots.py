"""Results -> figures: speed against the loop, serving, scaling, the published setting. Matplotlib, no screen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.reporting.results import Result

matplotlib.use("Agg")
OURS, OTHERS, FAINT = "#d1495b", "#66788a", "#b8c4ce"
SERVED = {"ours": OURS, "separate": "#30638e", "loop": "#8d99ae", "workflow": "#edae49", "ours_reference": "#f4a3ad"}


def colour(name: str) -> str:
    """Ours stands out, whatever the plot."""
    return OURS if name.startswith("ours") else OTHERS


def plot_forward(figures: dict[str, Any]) -> Figure:
    """Bars of speed relative to the loop, one panel per cell."""
    cells = [cell for cell in figures["cells"] if cell["rows"]]
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * lines), layout="constrained")
    for index, cell in enumerate(cells):
        axes = figure.add_subplot(lines, columns, index + 1)
        rows = [row for row in cell["rows"] if "left_out" not in row][::-1]
        bars = axes.barh(
            [row["rival"].replace("_", " ") for row in rows], [row["ratio"] for row in rows],
            color=[colour(row["rival"]) for row in rows],
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{cell['network']}, N = {cell['members']}, batch {cell['batch']}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.15)
    figure.supxlabel("speed, loop = 1", fontsize=9)
    return figure


def plot_serve(figures: dict[str, Any]) -> Figure:
    """Requests per second, p99 and memory in the closed loop, by rival and number of members."""
    rows = [row for row in figures["rows"] if "clients" in row]
    panels = (("requests_per_s", "requests/s"), ("p99_ms", "p99, ms"), ("worker_mib", "workers' memory, MiB"))
    handlers = list(dict.fromkeys(row["handler"] for row in rows))
    figure = Figure(figsize=(12, 3.2 * len(handlers)), layout="constrained")
    for line, handler in enumerate(handlers):
        own = [row for row in rows if row["handler"] == handler]
        counts = sorted({row["members"] for row in own})
        names = list(dict.fromkeys(row["rival"] for row in own))
        for column, (key, label) in enumerate(panels):
            axes = figure.add_subplot(len(handlers), 3, 3 * line + column + 1)
            for position, name in enumerate(names):
                values = [_first(own, name, count, key) for count in counts]
                places = [
                    index + (position - (len(names) - 1) / 2) * 0.8 / len(names) for index in range(len(counts))
                ]
                bars = axes.bar(places, values, 0.8 / len(names), label=name, color=SERVED[name])
                axes.bar_label(bars, fmt="%.0f", fontsize=6)
            axes.set_xticks(range(len(counts)), [f"N = {count}" for count in counts])
            axes.set_ylabel(label)
            axes.set_title(handler, fontsize=9)
        axes.legend(fontsize=7)
    return figure


def _first(rows: list[dict[str, Any]], name: str, count: int, key: str) -> float:
    return next((row[key] or 0.0 for row in rows if row["rival"] == name and row["members"] == count), 0.0)


def plot_scaling(figures: dict[str, Any]) -> Figure:
    """Times and memory against the number of members, with the fitted lines."""
    tables = figures["networks"]
    figure = Figure(figsize=(4.2 * len(tables), 5.6), layout="constrained")
    for index, table in enumerate(tables):
        counts = [row["members"] for row in table["rows"]]
        above = figure.add_subplot(2, len(tables), index + 1)
        for name in ("loop", "ours"):
            own = [row[name] for row in table["rows"]]
            values = [timing["median_ms"] for timing in own]
            spread = [
                [value - timing["p10_ms"] for value, timing in zip(values, own, strict=True)],
                [timing["p90_ms"] - value for value, timing in zip(values, own, strict=True)],
            ]
            above.errorbar(counts, values, yerr=spread, fmt="o", color=colour(name), capsize=2)
            _draw_fit(above, counts, table["fits"][f"{name}_ms"], f"{name}: {{:.2f}} ms a member", colour(name))
        above.set_title(f"{table['network']}, batch {table['batch']}", fontsize=9)
        above.set_ylabel("median, ms")
        below = figure.add_subplot(2, len(tables), len(tables) + index + 1)
        for key, shade in (("peak_mib", OURS), ("stack_mib", OTHERS)):
            below.plot(counts, [row[key] for row in table["rows"]], "o", color=shade)
            _draw_fit(below, counts, table["fits"][key], f"{key.split('_')[0]}: {{:.1f}} MiB a member", shade)
        below.set_ylabel("MiB")
        below.set_xlabel("members")
        for axes in (above, below):
            axes.set_ylim(bottom=0)
            axes.set_xticks(counts)
            axes.legend(fontsize=7)
    return figure


def _draw_fit(axes: Any, counts: list[int], fit: dict[str, float], label: str, shade: str) -> None:
    ends = [min(counts), max(counts)]
    line = [fit["intercept"] + fit["slope"] * end for end in ends]
    axes.plot(ends, line, color=shade, linewidth=1, label=label.format(fit["slope"]))


def plot_seeds(figures: dict[str, Any]) -> Figure:
    """Ratios of loop to vmap here, beside the published ones in a fainter colour."""
    cells = figures["cells"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for position, (name, label, shade) in enumerate(
        (("stock_vmap", "stock vmap, here", OTHERS), ("ours_auto", "ours, here", OURS))
    ):
        values = [next((r.get("ratio", 0.0) for r in cell["rows"] if r["rival"] == name), 0.0) for cell in cells]
        bars = axes.bar(
            [i + (position - 1) * 0.27 for i in range(len(cells))], values, 0.27, label=label, color=shade
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    published = [cell["published_ratio"] for cell in cells]
    where = [index + 0.27 for index in range(len(cells))]
    bars = axes.bar(where, published, 0.27, label="published: stock vmap on a GPU of 2022", color=FAINT)
    axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [cell["network"] for cell in cells], fontsize=8)
    axes.set_ylabel("loop / vmap")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "forward": plot_forward,
    "serve": plot_serve,
    "scaling": plot_scaling,
    "seeds": plot_seeds,
}


def draw_plots(results: list[Result], folder: Path) -> list[Path]:
    """Draw one PNG per result that has a plot; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        if result.table in PLOTS:
            path = folder / f"{result.name}.png"
            PLOTS[result.table](result.figures).savefig(path, dpi=110, metadata={"Software": None})
            paths.append(path)
    return paths
