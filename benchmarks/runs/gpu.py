"""What `python -m benchmarks.gpu` does: check handlers' networks on the GPU, measure all rivals, write one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cells import measure
from benchmarks.gpu.correctness import check_all
from benchmarks.gpu.settings import SETTINGS
from benchmarks.measuring.measure import describe_machine, describe_versions
from benchmarks.reporting.results import chip_slug
from vmap_ensemble.execution.timing import Budget
from vmap_ensemble.process.device import set_float32_precision

NO_GPU = 2
NAME, COMMAND = "gpu", "python -m benchmarks.gpu --json benchmarks/results"
# Seconds in all, of which correctness takes a part at most, and measuring of one setting.
FULL, QUICK = (220.0, 60.0, 0.7), (52.0, 20.0, 0.5)


def start(folder: Path | None, quick: bool) -> int:
    """Check, measure, and write into a folder if there is one; the exit code, `NO_GPU` where torch finds none."""
    if not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device here, so nothing was checked or measured", file=sys.stderr)
        return NO_GPU
    figures = run(torch.device("cuda:0"), quick)
    if folder:
        print(f"wrote {write(folder, figures, quick)}")
    return report(figures)


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """Correctness first, then times; what the time doesn't last for is listed as such."""
    total_s, correctness_s, seconds = QUICK if quick else FULL
    budget = Budget(total_s)
    set_float32_precision("highest")
    machine = {**describe_machine(device), **describe_versions("torchvision", "transformers")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = check_all(device, ["fp16"] if quick else ["fp16", "fp32", "bf16"], Budget(correctness_s))
    # Those of --quick first: they are of all kinds, and what comes last may find the time spent.
    settings = sorted((one for one in SETTINGS if one.quick or not quick), key=lambda one: not one.quick)
    return {"machine": machine, "correctness": rows, "cells": measure(settings, device, budget, seconds)}


def write(folder: Path, figures: dict[str, Any], quick: bool) -> Path:
    """One file, named after the chip, as `python -m benchmarks.report` reads it; a quick run has another name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{NAME}-quick" if quick else NAME
    path = folder / f"{name}-{chip_slug(figures['machine'])}.json"
    facts = {"job": name, "command": f"{COMMAND}{' --quick' if quick else ''}", "table": "forward"}
    path.write_text(json.dumps({**facts, **figures}, indent=1) + "\n")
    return path


def report(figures: dict[str, Any]) -> int:
    """Print what is wrong and what was not reached; the exit code, which speed doesn't decide."""
    wrong = [row for row in figures["correctness"] if row["error"]]
    different = [(cell, row) for cell in figures["cells"] for row in cell["rows"] if not row.get("equal", True)]
    slow = [cell for cell in figures["cells"] if not cell.get("reached", True)]
    checked = len(figures["correctness"])
    print(f"\n{checked - len(wrong)} of {checked} ways are right; {len(slow)} settings are slower than wanted")
    for row in wrong:
        print(f"error: {row['handler']}, {row['dtype']}, {row['mode']}: {row['error']}", file=sys.stderr)
    for cell, row in different:
        print(f"error: {cell['network']}: {row['rival']} differs from the loop", file=sys.stderr)
    return 1 if wrong or different else 0
