"""Turns an output into what a person wants to know of it: a table, the same as JSON, and one page with plots."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vmap_ensemble.offline.output import read_lines
from vmap_ensemble.offline.page import bars, page, table

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
    steps = [f"{low:g} to {high:g}" for low, high in pairwise(EDGES)] + [f"{EDGES[-1]:g} and more"]
    labels = list(summary.labels.items())[:MOST_LABELS]
    plots = [bars("Labels", labels)] if labels else []
    if any(summary.disagreement):
        counted = list(zip(steps, summary.disagreement, strict=True))
        plots.append(bars("Disagreement of the members: rows by mutual information, in nats", counted))
    path.write_text(page("Predictions", table(summary.table()), *plots), encoding="utf-8")
