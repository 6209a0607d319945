"""Members and test images -> scores of each, of the ensemble, and their table."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from quality.scores import (
    CALIBRATION_BINS,
    Disagreement,
    Score,
    combine,
    describe_disagreement,
    measure_disagreement,
    score,
)
from training.runs.mnist import open_data, predict_log_probabilities
from training.runs.mnist_data import DataError, Digits
from vmap_ensemble.archive.checkpoints import find_checkpoints, read_state_dict
from vmap_ensemble.errors import EnsembleError, MemberError
from vmap_ensemble.models.mnist import MnistNet


def find_members(paths: list[Path]) -> list[Path]:
    """Resolve files and folders to checkpoint files, folders in the order of their names.

    Raises:
        DataError: a path does not exist, or a folder holds no checkpoint.
    """
    try:
        return find_checkpoints(paths)
    except MemberError as error:
        raise DataError(f"{error}; `python -m training.mnist --save-model` trains some") from None


def predict_members(files: list[Path], digits: Digits) -> Tensor:
    """Run each member over a split, one after another; returns (M, N, 10) log-probabilities."""
    outputs = []
    for file in tqdm(files, desc="members", unit="member"):
        model = MnistNet()
        model.load_state_dict(read_state_dict(file))
        outputs.append(predict_log_probabilities(model.eval(), digits))
    return torch.stack(outputs)


def format_rows(scores: list[Score]) -> list[list[str]]:
    """Turn scores into cells, in the order of the columns that column_titles gives."""
    return [[s.name, f"{s.accuracy:.2%}", f"{s.nll:.4f}", f"{s.ece:.2%}", f"{s.brier:.4f}"] for s in scores]


def column_titles() -> list[str]:
    """Titles of the table's columns: the fields of Score."""
    titles = {
        "name": "member",
        "nll": "NLL (nats)",
        "ece": f"ECE ({CALIBRATION_BINS} bins)",
        "brier": "Brier",
    }
    return [titles.get(field.name, field.name) for field in fields(Score)]


def format_markdown(scores: list[Score], found: Disagreement) -> str:
    """The table as Markdown, with the line on disagreement below."""
    rows = [column_titles(), ["---"] + ["---:"] * (len(column_titles()) - 1), *format_rows(scores)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    line = describe_disagreement(found)
    return f"{table}\n\n{line[0].upper()}{line[1:]}."


def print_table(scores: list[Score], found: Disagreement) -> None:
    """Print the table for people."""
    table = Table()
    for position, title in enumerate(column_titles()):
        table.add_column(title, justify="right" if position else "left")
    for row, of in zip(format_rows(scores), scores, strict=True):
        table.add_row(*row, style="bold" if of.name == "ensemble" else None)
    Console().print(table)
    print(describe_disagreement(found))


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        files = find_members(options.members)
        _, _, test = open_data(options.data_dir, options.download)
        outputs = predict_members(files, test)
    except (DataError, EnsembleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    scores = [score(file.stem, output, test.labels) for file, output in zip(files, outputs, strict=True)]
    combined = combine(outputs)
    scores.append(score("ensemble", combined.probabilities.clamp_min(1e-38).log(), test.labels))
    found = measure_disagreement(combined, test.labels)
    if options.markdown:
        print(format_markdown(scores, found))
    else:
        print_table(scores, found)
    if options.json:
        figures = {"scores": [asdict(s) for s in scores], "disagreement": asdict(found), "images": len(test)}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
