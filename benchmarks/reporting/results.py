"""benchmarks/results/*.json -> results: the figures that a command wrote, with the command and the machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parents[1] / "results"
NO_GPU = "GPU: not yet measured."


@dataclass(frozen=True)
class Result:
    """One file of figures.

    Attributes:
        name: of the file, without its ending: the job and the chip.
        job: which of benchmarks.all made it.
        command: that made it.
        table: which benchmark it is of.
        figures: all that it holds.
    """

    name: str
    job: str
    command: str
    table: str
    figures: dict[str, Any]

    @property
    def chip_and_cores(self) -> str:
        """For headings."""
        facts = self.figures["machine"]
        return f"{facts.get('gpu') or facts['cpu']}, {facts['cores']} cores"

    @property
    def chip(self) -> str:
        """Chip, cores and versions, the same for all files of one machine."""
        return f"{self.chip_and_cores}, torch {self.figures['machine']['torch']}"

    @property
    def machine(self) -> str:
        """One line: chip, cores, threads, versions, date."""
        facts = self.figures["machine"]
        return f"{self.chip}, {facts['threads']} threads, Python {facts['python']}, {facts['time'][:10]}"


def chip_slug(machine: dict[str, Any]) -> str:
    """The chip as part of a file's name."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_results(folder: Path = FOLDER) -> list[Result]:
    """All files of a folder, in the order of their names."""
    results = []
    for path in sorted(folder.glob("*.json")):
        figures = json.loads(path.read_text())
        results.append(Result(path.stem, figures["job"], figures["command"], figures["table"], figures))
    return results


def gpu_note(results: list[Result]) -> str:
    """Says which GPU was measured, or that none was."""
    chips = sorted({result.figures["machine"]["gpu"] for result in results if "gpu" in result.figures["machine"]})
    return f"GPU: {', '.join(chips)}." if chips else NO_GPU
