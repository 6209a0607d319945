"""Turns an output into what a person wants to know of it: a table, the same as JSON, and one page with plots."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vmap_ensemble.offline.output import read_lines

# Edges of the bars of mutual information, in nats; more is more.
EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MOST_LABELS = 20


@dataclass
class Summary:
    """What an output holds.

    Attributes:
        rows: All rows.
        errors: Status -> rows that have no answer.
        labels: Label -> rows; of classifications.
        abstained: Rows whose answer says so.
        disagreement: Rows by mutual information, one count per step of EDGES.
        facts: Archive, batch size, seconds, rows per second of the run that finished it.
    """

    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    abstained: int = 0
    disagreement: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    facts: dict[str, Any] = field(default_factory=dict)

    def table(self) -> list[tuple[str, str]]:
        """Rows of two words: what, how many."""
        told = [("rows", f"{self.rows:,}"), ("without an answer", f"{sum(self.errors.values()):,}")]
        told += [(f"  status {status}", f"{count:,}") for status, count in sorted(self.errors.items())]
        told += [("abstained", f"{self.abstained:,}")] * bool(self.abstained)
        told += [(f"  {label[:40]}", f"{count:,}") for label, count in list(self.labels.items())[:MOST_LABELS]]
        return told + [(name.replace("_", " "), str(value)) for name, value in self.facts.items()]


def summarise(lines: Path, facts: dict[str, Any]) -> Summary:
    """Read an output once, in constant memory.

    Args:
        lines: An output that is finished.
        facts: What is known of the run.
    """
    summary, labels, errors = Summary(facts=facts), Counter[str](), Counter[str]()
    for line in read_lines(lines):
        summary.rows += 1
        body = line.get("answer")
        if body is None:
            errors[str(line["error"]["code"])] += 1
            continue
        top = body.get("prediction")
        if isinstance(top, dict) and isinstance(top.get("label"), str):
            labels[top["label"]] += 1
        summary.abstained += body.get("abstain") is True
        information = (body.get("uncertainty") or {}).get("mutual_information")
        if information is not None:
            summary.disagreement[sum(information >= edge for edge in EDGES[1:])] += 1
    summary.labels, summary.errors = dict(labels.most_common()), dict(errors)
    return summary


def write_summary(summary: Summary, path: Path) -> None:
    """As JSON, or as a page where the name ends in .html."""
    if path.suffix != ".html":
        path.write_text(json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    rows = "".join(f"<tr><td>{html.escape(a)}<td>{html.escape(b)}" for a, b in summary.table())
    steps = [f"{low:g} to {high:g}" for low, high in pairwise(EDGES)] + [f"{EDGES[-1]:g} and more"]
    labels = list(summary.labels.items())[:MOST_LABELS]
    plots = _bars("Labels", labels) if labels else ""
    if any(summary.disagreement):
        counted = list(zip(steps, summary.disagreement, strict=True))
        plots += _bars("Disagreement of the members: rows by mutual information, in nats", counted)
    path.write_text(PAGE.format(rows=rows, plots=plots), encoding="utf-8")


def _bars(title: str, counts: list[tuple[str, int]]) -> str:
    """Bars as SVG, with their numbers: read without a script, in light and dark."""
    most = max(count for _, count in counts) or 1
    bars = "".join(
        f'<text x="190" y="{y + 14}" text-anchor="end">{html.escape(name[:28])}</text>'
        f'<rect x="200" y="{y + 2}" width="{400 * count / most:.1f}" height="16" />'
        f'<text x="{206 + 400 * count / most:.1f}" y="{y + 14}">{count:,}</text>'
        for y, (name, count) in zip(range(0, 22 * len(counts), 22), counts, strict=True)
    )
    head = f'<svg role="img" aria-label="{html.escape(title)}" viewBox="0 0 680 {22 * len(counts)}">'
    return f"<h2>{html.escape(title)}</h2>{head}{bars}</svg>"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Predictions</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui; max-width: 45rem; margin: 2rem auto; padding: 0 1rem }}
td {{ padding-right: 2rem }} svg {{ width: 100%; font-size: 13px; fill: currentColor }} rect {{ fill: #4477aa }}
</style><h1>Predictions</h1><table>{rows}</table>{plots}</html>
"""
