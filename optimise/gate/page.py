"""Turns a tool's figures into one page of HTML: the table, what it cost and kept as bars, and how it learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimise.gate.report import BATCHES, Column, rows_of
from optimise.output.write import write_json
from vmap_ensemble.offline.page import bars, lines, page, table
from vmap_ensemble.process.files import written_whole


def write_page(
    path: Path,
    title: str,
    columns: Mapping[str, Column],
    facts: Mapping[str, Any],
    history: Sequence[tuple[float, float]] = (),
    reason: str | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: The file.
        title: Of the page.
        columns: The figures, what was made last.
        facts: What else is known of the run.
        history: Per epoch the loss and the held-out loss.
        reason: Why it was refused.
    """
    parts = [table([[f"refused: {reason}" if reason else "accepted"]]), table(rows_of(columns), ["", *columns])]
    parts += _plots(columns)
    if history and all(math.isfinite(value) for pair in history for value in pair):
        trained, held_out = zip(*history, strict=True)
        parts.append(lines("Loss by epoch", {"trained on": trained, "held out": held_out}))
    parts.append(table([[key.replace("_", " "), _shown(value)] for key, value in facts.items()]))
    _write(path, title, *parts)


def write_facts(path: Path, title: str, facts: Mapping[str, Any], *plots: str) -> None:
    """What a tool without a gate tells: JSON in `path`, and the same with plots as a page beside it."""
    write_json(path, facts)
    rows = [[key.replace("_", " "), _shown(value)] for key, value in facts.items()]
    _write(path.with_suffix(".html"), title, table(rows), *plots)


def _write(path: Path, title: str, *parts: str) -> None:
    with written_whole(path) as scratch:
        scratch.write_text(page(title, *parts), encoding="utf-8")


def _plots(columns: Mapping[str, Column]) -> list[str]:
    named = list(columns.items())
    wrong = [(name, 100 * (1 - one.accuracy)) for name, one in named]
    plots = [bars("Wrong answers, in percent", wrong, ".2f")]
    plots.append(bars("NLL, in nats", [(name, one.nll) for name, one in named if math.isfinite(one.nll)], ".4f"))
    for size in BATCHES:
        times = [(name, one.latency_ms[str(size)]) for name, one in named if one.latency_ms]
        if times:
            plots.append(bars(f"Time of a forward at batch {size}, in milliseconds", times, ".2f"))
    sizes = [(name, one.size_mib) for name, one in named if one.size_mib is not None]
    return [*plots, bars("Size, in MiB", sizes, ".1f")] if sizes else plots


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)
