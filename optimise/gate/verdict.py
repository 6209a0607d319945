"""Turns what a tool made into members, a report and, where the gate lets it pass, a block that packs them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from optimise.errors import GateError
from optimise.examples.sources import Parts
from optimise.examples.teacher import Teacher
from optimise.gate.judge import Made, judge, labels_to_judge_by
from optimise.gate.page import write_page
from optimise.gate.report import Column, Limits, as_json, reason_against, rows_of
from optimise.output.work import PAGE, REPORT
from optimise.output.write import write_block, write_json, write_members
from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.process.device import cpu_name


def forget_verdict(output: Path) -> None:
    """Remove what an earlier run said, before what it said it of is replaced."""
    for old in (REPORT, PAGE, SETTINGS_FILE):
        (output / old).unlink(missing_ok=True)


def finish(
    options: argparse.Namespace,
    teacher: Teacher,
    archive: Path,
    made: Made,
    parts: Parts,
    name: str,
    told: Mapping[str, Any],
    history: list[tuple[float, float]],
) -> Path:
    """Judge, write and show; returns the block that packs it.

    Args:
        options: Output, limits and force of the command.
        teacher: The ensemble.
        archive: It, unpacked.
        made: Of it.
        parts: What it is judged by.
        name: Of the archive that the block packs.
        told: What else the report says.
        history: Per epoch the loss and the held-out loss.

    Raises:
        GateError: More is lost than is allowed; the members are written, and no block.
    """
    columns = judge(teacher, made, parts.test, parts.unlike)
    _, labels_are_real = labels_to_judge_by(parts.test)
    files = write_members(options.output, made.states)
    _show(columns, labels_are_real)
    reason = reason_against(columns, Limits(options.max_accuracy_loss, options.max_nll_loss))
    facts = {**told, **_facts(teacher, parts, labels_are_real)}
    report = {"accepted": reason is None, "reason": reason, **facts, **as_json(columns), "history": history}
    write_json(options.output / REPORT, report)
    write_page(options.output / PAGE, f"{teacher.settings.name}: {made.title}", columns, facts, history, reason)
    if reason and not options.force:
        raise GateError(
            f"refused: {reason}. The members are in {options.output}, without the setup_config.json that packs "
            "them; --force writes it"
        )
    return write_block(options.output, archive, name, made.settings, files, made.folder)


def tell_how_to_pack(name: str, block: Path) -> int:
    """The command's last line; returns its exit code."""
    print(f"pack it: ./archive.sh {name} --config {block}")
    return 0


def _facts(teacher: Teacher, parts: Parts, labels_are_real: bool) -> dict[str, Any]:
    device = teacher.device
    return {
        "examples": {"learn": len(parts.learn), "held_out": len(parts.held_out), "test": len(parts.test)},
        "skipped": parts.skipped,
        "labels": "given" if labels_are_real else "the ensemble's own",
        "processor": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _show(columns: Mapping[str, Column], labels_are_real: bool) -> None:
    table = Table(box=None)
    table.add_column("" if labels_are_real else "by the ensemble's labels")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows_of(columns):
        table.add_row(*row)
    Console().print(table)
