"""Results -> figures: one per file, with lines from p10 to p90 and `auto` marked. Matplotlib, no screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.reporting.names import AUTO, SCORES, SERVED, is_ours, name_network, name_rival
from benchmarks.reporting.results import Result

matplotlib.use("Agg")
MARKED, OURS, OTHERS, FAINT = "#d1495b", "#f0b6bd", "#8d9bab", "#c9d3db"
SHADES = {"ours": MARKED, "separate": "#30638e", "loop": OTHERS, "workflow": "#edae49", "ours_reference": OURS}
KINDS = ("#30638e", "#edae49", "#7a4f9a", "#3a8a5f")
WHISKER = {"linewidth": 0.9, "color": "#222222"}
LEGEND = (
    Patch(facecolor=MARKED, edgecolor="black", linewidth=1.6, label="ours: auto, served by default"),
    Patch(facecolor=OURS, label="ours, other ways"),
    Patch(facecolor=OTHERS, label="rivals"),
    Line2D([], [], linewidth=0.9, color="#222222", label="p10 to p90"),
)
Rows = Sequence[dict[str, Any]]


def colour(key: str) -> str:
    """`auto` stands out, whatever the plot; ours are of its colour."""
    return MARKED if key == AUTO else OURS if is_ours(key) else OTHERS


def speeds_of(rows: Rows, baseline_ms: float) -> tuple[list[float], list[list[float]]]:
    """Speeds relative to a baseline's median, and how far their p10 to p90 reaches below and above: (2, rows)."""
    speeds = [baseline_ms / row["median_ms"] for row in rows]
    below = [speed - baseline_ms / row["p90_ms"] for speed, row in zip(speeds, rows, strict=True)]
    above = [baseline_ms / row["p10_ms"] - speed for speed, row in zip(speeds, rows, strict=True)]
    return speeds, [below, above]


def draw_speeds(axes: Any, rows: Rows, title: str) -> None:
    """Bars of speed relative to the first row, which has the ratio 1, with `auto` marked."""
    shown = [row for row in rows if "left_out" not in row]
    speeds, spread = speeds_of(shown, shown[0]["median_ms"])
    marked = [row["rival"] == AUTO for row in shown]
    places = range(len(shown))
    axes.barh(
        places, speeds, xerr=spread, color=[colour(row["rival"]) for row in shown], error_kw=WHISKER,
        edgecolor=["black" if mark else "none" for mark in marked], linewidth=1.6,
    )  # fmt: skip
    axes.set_yticks(places, [name_rival(row["rival"]) for row in shown], fontsize=7)
    for place, speed, reach, mark in zip(places, speeds, spread[1], marked, strict=True):
        weight = "bold" if mark else "normal"
        axes.text(speed + reach, place, f"  {speed:.2f}", va="center", fontsize=7, fontweight=weight)
        axes.get_yticklabels()[place].set_fontweight(weight)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.16)


def plot_speeds(panels: Sequence[tuple[str, Rows]], label: str, legend: Sequence[Any] = LEGEND) -> Figure:
    """A panel for each title and its rows, two or three in a line, and one legend."""
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(7.5, 5.0 * columns), 0.6 + 2.9 * lines), layout="constrained")
    for index, (title, rows) in enumerate(panels):
        draw_speeds(figure.add_subplot(lines, columns, index + 1), rows, title)
    figure.supxlabel(label, fontsize=9)
    figure.legend(handles=list(legend), loc="outside upper center", ncols=len(legend), fontsize=8, frameon=False)
    return figure


def plot_forward(figures: dict[str, Any]) -> Figure:
    """Bars of speed relative to the loop, one panel per cell."""
    cells = [cell for cell in figures["cells"] if cell["rows"]]
    panels = [
        (f"{name_network(cell['network'])}, N = {cell['members']}, batch {cell['batch']}", cell["rows"])
        for cell in cells
    ]
    return plot_speeds(panels, "speed, loop = 1")


def plot_bert(figures: dict[str, Any]) -> Figure:
    """Bars of speed relative to the first way, one panel per batch and per trunk."""
    panels = [
        (f"{batch['batch']}: {batch['tokens']} tokens, {batch['texts']} texts", batch["rows"])
        for batch in figures["batches"]
    ]
    panels += [
        (f"{table['heads']} heads on one trunk, {table['texts']} texts", table["rows"])
        for table in figures.get("trunk", [])
    ]
    ours = Patch(facecolor=OURS, label="ours")
    return plot_speeds(panels, "speed, first row = 1", (ours, *LEGEND[2:]))


def plot_serve(figures: dict[str, Any]) -> Figure:
    """Requests per second, latency and memory in the closed loop, by rival and number of members."""
    rows = [row for row in figures["rows"] if "clients" in row]
    handlers = list(dict.fromkeys(row["handler"] for row in rows))
    figure = Figure(figsize=(12, 3.4 * len(handlers)), layout="constrained")
    for line, handler in enumerate(handlers):
        own = [row for row in rows if row["handler"] == handler]
        for column, (key, label) in enumerate(SERVE_PANELS):
            axes = figure.add_subplot(len(handlers), 3, 3 * line + column + 1)
            _draw_served(axes, own, key)
            axes.set_ylabel(label)
            axes.set_title(name_network(handler), fontsize=9)
        axes.legend(fontsize=7)
    return figure


SERVE_PANELS = (
    ("requests_per_s", "requests/s, slowest to fastest round"),
    ("p50_ms", "latency, ms: median, line to p90, dot p99"),
    ("worker_mib", "workers' memory, MiB"),
)


def _draw_served(axes: Any, rows: Rows, key: str) -> None:
    counts = sorted({row["members"] for row in rows})
    names = list(dict.fromkeys(row["rival"] for row in rows))
    width = 0.8 / len(names)
    for position, name in enumerate(names):
        own = [row for row in rows if row["rival"] == name and row[key] is not None]
        places = [counts.index(row["members"]) + (position - (len(names) - 1) / 2) * width for row in own]
        values = [row[key] for row in own]
        edge = {"edgecolor": "black", "linewidth": 1.4} if name == "ours" else {}
        shade = SHADES.get(name, FAINT)
        bars = axes.bar(places, values, width, label=SERVED.get(name, name), color=shade, **edge)
        axes.bar_label(bars, fmt="%.0f", fontsize=6, label_type="center", color="black")
        least, greatest = {
            "requests_per_s": ("least_requests_per_s", "greatest_requests_per_s"), "p50_ms": ("p10_ms", "p90_ms")
        }.get(key, (key, key))  # fmt: skip
        spread = [
            [value - row.get(least, value) for value, row in zip(values, own, strict=True)],
            [row.get(greatest, value) - value for value, row in zip(values, own, strict=True)],
        ]
        if key != "worker_mib":
            axes.errorbar(places, values, yerr=spread, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
        if key == "p50_ms":
            axes.plot(places, [row["p99_ms"] for row in own], "k.", markersize=4)
    axes.set_xticks(range(len(counts)), [f"N = {count}" for count in counts])


LABELS = {"loop": "loop", "ours": "ours: auto"}


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
            above.errorbar(counts, values, yerr=spread, fmt="o", color=SHADES[name], capsize=2)
            _draw_fit(
                above, counts, table["fits"][f"{name}_ms"], f"{LABELS[name]}: {{:.2f}} ms a member", SHADES[name]
            )
        above.set_title(f"{name_network(table['network'])}, batch {table['batch']}", fontsize=9)
        above.set_ylabel("median, p10 to p90, ms")
        below = figure.add_subplot(2, len(tables), len(tables) + index + 1)
        for key, shade in (("peak_mib", MARKED), ("stack_mib", OTHERS)):
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
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for position, name in enumerate(("stock_vmap", AUTO)):
        own = [(place, cell) for place, cell in enumerate(cells) if _row(cell, name)]
        speeds, reaches = [], []
        for _, cell in own:
            (speed,), reach = speeds_of([_row(cell, name)], _row(cell, "loop")["median_ms"])
            speeds.append(speed)
            reaches.append([reach[0][0], reach[1][0]])
        bars = axes.bar(
            [place + (position - 1) * 0.27 for place, _ in own], speeds, 0.27, label=f"{name_rival(name)}, here",
            yerr=list(zip(*reaches, strict=True)), error_kw=WHISKER, color=colour(name), linewidth=1.6,
            edgecolor="black" if name == AUTO else "none",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    published = [cell["published_ratio"] for cell in cells]
    where = [index + 0.27 for index in range(len(cells))]
    label = f"published: stock vmap, {cells[0]['published_on'].partition(',')[0]}"
    bars = axes.bar(where, published, 0.27, label=label, color=FAINT)
    axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(cells)), [name_network(cell["network"]) for cell in cells], fontsize=8)
    axes.set_ylabel("loop / vmap, p10 to p90")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return figure


def _row(cell: dict[str, Any], name: str) -> dict[str, Any]:
    return next((row for row in cell["rows"] if row["rival"] == name and "left_out" not in row), {})


def plot_loading(figures: dict[str, Any]) -> Figure:
    """Seconds per phase, and memory against its bound."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    sizes = {name: figures[f"{name}_mib"] for name in ("stack", "peak", "bound")}
    panels = ((figures["phases_s"], "seconds", "%.2f"), (sizes, "memory, MiB", "%.0f"))
    for index, (values, label, form) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1)
        names = [name.replace("_", " ") for name in values]
        shades = [FAINT if name == "bound" else MARKED for name in values]
        bars = axes.barh(names, list(values.values()), color=shades)
        axes.bar_label(bars, fmt=form, padding=3, fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{figures['members']} x {name_network(figures['architecture'])}", fontsize=9)
    return figure


def plot_uncertainty(figures: dict[str, Any]) -> Figure:
    """Distributions of mutual information, and a ROC curve for each kind of unlike inputs."""
    kinds = figures["unlike"]
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, len(kinds))
    _draw_information(figure.add_subplot(grid[0, :]), figures)
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[1, index])
        for row in kind["scores"]:
            wide = row["score"] == "mutual_information"
            axes.plot(
                figures["false_alarm_grid"], row["curve"], label=f"{SCORES[row['score']][0]}: {row['auroc']:.3f}",
                color=SCORE_SHADES[row["score"]], linewidth=2.4 if wide else 1.2, zorder=3 if wide else 2,
            )  # fmt: skip
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
        axes.axvline(figures["false_alarms"], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(kind["inputs"].partition(":")[0], fontsize=9, color=KINDS[1 + index])
        axes.set_xlabel("share of digits refused", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=8, loc="lower right", title="AUROC", title_fontsize=8)
        if index == 0:
            axes.set_ylabel("share of unlike inputs found", fontsize=8)
    return figure


SCORE_SHADES = {
    "mutual_information": MARKED, "predictive_entropy": "#e58a3c", "ensemble_probability": "#30638e",
    "member_probability": OTHERS,
}  # fmt: skip


def _draw_information(axes: Any, figures: dict[str, Any]) -> None:
    edges = figures["edges_nats"]
    for shade, kind in zip(KINDS, (figures["digits"], *figures["unlike"]), strict=False):
        share = [count / kind["count"] for count in kind["histogram"]]
        filled = kind is figures["digits"]
        axes.stairs(
            share, edges, color=shade, fill=filled, alpha=0.35 if filled else 1, linewidth=1.6, label=kind["inputs"]
        )
    axes.axvline(figures["threshold_nats"], color="black", linewidth=0.8, linestyle=":")
    axes.margins(y=0.12)
    refused = f" refuses {figures['false_alarms']:.0%} of digits"
    axes.text(figures["threshold_nats"], axes.get_ylim()[1], refused, fontsize=8, va="top")
    axes.set_xscale("log")
    axes.set_xlabel("mutual information, nats (the first bin holds all that is less)", fontsize=8)
    axes.set_ylabel("share of the inputs", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=8, loc="upper left")


PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "forward": plot_forward,
    "serve": plot_serve,
    "bert": plot_bert,
    "scaling": plot_scaling,
    "seeds": plot_seeds,
    "loading": plot_loading,
    "uncertainty": plot_uncertainty,
}


def draw_plots(results: list[Result], folder: Path) -> list[Path]:
    """Draw one PNG per result; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        path = folder / f"{result.name}.png"
        PLOTS[result.table](result.figures).savefig(path, dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths
