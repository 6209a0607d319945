"""Forwards of the same members in several precisions -> how far they agree, their times, and a table of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring.measure import Timing, measure_interleaved

BLOCK = 4  # calls of one rival in a row
HOPELESS = 5  # times the baseline


@dataclass(frozen=True)
class Agreement:
    """How the members' outputs compare with the baseline's.

    Attributes:
        top1: Share of members' predictions that are the same.
        largest: Largest difference of a logit, relative to the baseline's largest logit.
        mean: Mean difference of the logits, relative to the same.
        predictions: M * B, how many were compared.
    """

    top1: float
    largest: float
    mean: float
    predictions: int

    @classmethod
    def of(cls, want: Tensor, got: Tensor) -> Agreement:
        """Compare logits, each (M, B, C)."""
        apart, scale = (got - want).abs(), want.abs().max()
        same = (got.argmax(-1) == want.argmax(-1)).float().mean()
        return cls(float(same), float(apart.max() / scale), float(apart.mean() / scale), want[..., 0].numel())


def drop_hopeless(runs: Mapping[str, Callable[[], Any]], baseline: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """What is worth measuring further, and the mean milliseconds of one call of each of them together."""
    trial = measure_interleaved(runs, torch.device("cpu"), warmup=1, iterations=2, block=2)
    medians = {timing.name: timing.median_ms for timing in trial}
    kept = dict(runs)
    for name, median in medians.items():
        if median > HOPELESS * medians[baseline]:
            times = median / medians[baseline]
            print(f"{name} takes {median:.0f} ms, {times:.0f} times the {baseline}; it is measured no further")
            del kept[name]
    return kept, sum(timing.mean_ms for timing in trial if timing.name in kept)


def time_for(runs: Mapping[str, Callable[[], Any]], round_ms: float, seconds: float) -> list[Timing]:
    """Time calls in turns for about so long; `round_ms` is what one call of each takes together."""
    rounds = max(3, min(100, round(1e3 * seconds / (BLOCK * round_ms))))
    return measure_interleaved(runs, torch.device("cpu"), BLOCK, rounds * BLOCK, BLOCK)


def time_table(
    title: str, timings: list[Timing], agreements: Mapping[str, Agreement], bases: Sequence[str]
) -> list[list[str]]:
    """Titles and cells; ratios are of medians, one for each of the rivals in `bases`."""
    medians = {timing.name: timing.median_ms for timing in timings}
    ratios = [f"x {base}" for base in bases]
    titles = [title, "median (ms)", "p10 to p90 (ms)", *ratios, "same top-1", "largest difference", "mean difference"]
    cells = []
    for timing in timings:
        agreement = agreements[timing.name]
        cells.append(
            [
                timing.name,
                f"{timing.median_ms:.2f}",
                f"{timing.p10_ms:.2f} to {timing.p90_ms:.2f}",
                *(f"{medians[base] / timing.median_ms:.2f}" for base in bases),
                f"{agreement.top1:.1%}",
                f"{agreement.largest:.1e}",
                f"{agreement.mean:.1e}",
            ]
        )
    return [titles, *cells]


def figures_of(timings: list[Timing], agreements: Mapping[str, Agreement]) -> dict[str, Any]:
    """What a table shows, as JSON has it."""
    return {
        "timings": [asdict(timing) for timing in timings],
        "agreement": {name: asdict(agreement) for name, agreement in agreements.items()},
    }


def show(rows: list[list[str]], markdown: bool) -> None:
    """Print a table, the first row of which are its titles."""
    titles, *cells = rows
    if markdown:
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *cells]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        return
    table = Table()
    for position, title in enumerate(titles):
        table.add_column(title, justify="right" if position else "left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
