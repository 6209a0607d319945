"""Turns the figures of an ensemble and of what was made of it into a table for people, JSON, and yes or no: the gate.

python -m optimise.gate.report runs/student/report.json      the table of a run that is finished, as Markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCHES = (1, 8)
COLUMNS = ("mean member", "ensemble", "student", "pruned", "quantised")


@dataclass(frozen=True)
class Column:
    """What is known of one of the three: the members' mean, the ensemble, what was made of it.

    Attributes:
        accuracy: Share of the held-out examples that it gets right.
        nll: Mean negative log-likelihood of the right label, in nats.
        ece: Expected calibration error.
        agreement: Share of examples on which its label is the ensemble's.
        mutual_information: Mean over the examples, in nats; None for a single network.
        auroc: Of the mutual information, unlike inputs against held-out ones; None without such inputs.
        parameters: Numbers that are stored.
        size_mib: Of them.
        latency_ms: Batch size -> median time of a forward; of a member, where there are several.
        peak_mib: What a forward of the largest batch holds beside the weights, at its peak; None where it isn't told.
    """

    accuracy: float
    nll: float
    ece: float
    agreement: float
    mutual_information: float | None = None
    auroc: float | None = None
    parameters: int | None = None
    size_mib: float | None = None
    latency_ms: dict[str, float] | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Limits:
    """What may be lost against the ensemble: accuracy as a share, NLL in nats."""

    accuracy: float = 0.01
    nll: float = 0.05


def reason_against(columns: Mapping[str, Column], limits: Limits) -> str | None:
    """Why the last column, what was made, is refused: what it loses and how much may be lost; None: accepted."""
    ensemble, made, reasons = columns["ensemble"], list(columns.values())[-1], []
    lost = ensemble.accuracy - made.accuracy
    if lost > limits.accuracy:
        reasons.append(
            f"accuracy {made.accuracy:.2%}, the ensemble's {ensemble.accuracy:.2%}: {lost:.2%} lost, "
            f"{limits.accuracy:.2%} allowed (--max-accuracy-loss)"
        )
    lost = made.nll - ensemble.nll
    if not lost <= limits.nll:  # NaN is refused as well
        reasons.append(
            f"NLL {made.nll:.4f}, the ensemble's {ensemble.nll:.4f}: {lost:.4f} lost, {limits.nll:g} allowed "
            "(--max-nll-loss)"
        )
    return "; ".join(reasons) or None


def _latency(size: int) -> Callable[[Column], str]:
    return lambda one: f"{one.latency_ms[str(size)]:.2f}" if one.latency_ms else ""


ROWS: dict[str, Callable[[Column], str]] = {
    "accuracy": lambda one: f"{one.accuracy:.2%}",
    "NLL (nats)": lambda one: f"{one.nll:.4f}",
    "ECE": lambda one: f"{one.ece:.2%}",
    "agreement with the ensemble": lambda one: f"{one.agreement:.2%}",
    "mutual information (nats)": lambda one: (
        "" if one.mutual_information is None else f"{one.mutual_information:.4f}"
    ),
    "AUROC of unlike inputs": lambda one: "" if one.auroc is None else f"{one.auroc:.4f}",
    "parameters": lambda one: "" if one.parameters is None else f"{one.parameters:,}",
    "size (MiB)": lambda one: "" if one.size_mib is None else f"{one.size_mib:.1f}",
    **{f"latency at batch {size} (ms)": _latency(size) for size in BATCHES},
    f"memory beside the weights at batch {BATCHES[-1]} (MiB)": lambda one: (
        "" if one.peak_mib is None else f"{one.peak_mib:.1f}"
    ),
}


def rows_of(columns: Mapping[str, Column]) -> list[list[str]]:
    """The table for people: a row per figure that is known of anybody, a cell per column."""
    rows = [[title, *(show(one) for one in columns.values())] for title, show in ROWS.items()]
    return [row for row in rows if any(row[1:])]


def as_json(columns: Mapping[str, Column]) -> dict[str, Any]:
    """The same for report.json."""
    return {name.replace(" ", "_"): asdict(one) for name, one in columns.items()}


def as_markdown(report: Mapping[str, Any]) -> str:
    """The table of a report.json."""
    keys = {name: name.replace(" ", "_") for name in COLUMNS}
    columns = {name: Column(**report[key]) for name, key in keys.items() if key in report}
    if len(columns) < 3:
        raise KeyError("columns")
    head = [["", *columns], ["---"] + ["---:"] * len(columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows_of(columns)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a finished run."""
    parser = argparse.ArgumentParser(
        prog="python -m optimise.gate.report", description="Print a run's table as Markdown.", allow_abbrev=False
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="report.json of the run's folder")
    path = parser.parse_args(arguments).report
    try:
        print(as_markdown(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path.name}: expected the report of a run, got {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
