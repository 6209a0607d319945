"""Turns a measured choice of how to run a forward into a JSON file, and the file into the next start's choice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmap_ensemble.process.device import cpu_kind
from vmap_ensemble.process.threads import cores_at_hand

logger = logging.getLogger(__name__)

# A choice measured while the machine was busy is measured once more; a machine that always is must not pay
# for it at every start.
MOST_MEASUREMENTS = 2
# Of measuring: choices of an older method are measured anew.
METHOD = 5


@dataclass
class Candidate:
    """One way to run the forward, and what was found about it.

    Attributes:
        name: The mode.
        latency_ms: Median reading per example, in the order of the examples; ends at the one on which it was
            far slower than the loop; empty if it wasn't measured.
        difference: Largest relative difference to the members' own forwards.
        refused: Why it can't serve; None if it can.
    """

    name: str
    latency_ms: list[float] = field(default_factory=list)
    difference: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen and why, and what building it measured (`Built.schedule`)."""

    name: str
    reason: str
    candidates: list[Candidate]
    schedule: Mapping[str, Any] | None = None


class ChoiceCache:
    """The choice of an earlier start for the same members, sizes, kind of machine, versions and threads.

    Each has a file of its own, named by a hash of all that: choices of several kinds of machine lie side by side.

    Args:
        folder: Where the file lies.
        archive: What the choice is for: a hash of the members.
        examples: Argument tuples of the sizes that are served.
        device: Where the members are.
        modes: Names of the candidates.
        kernels: Libraries of our own that they run on: others may be faster.
        packed: Folder of choices that the archive brings, which is only read.
    """

    def __init__(
        self,
        folder: Path,
        archive: str,
        examples: Sequence[tuple[Any, ...]],
        device: torch.device,
        modes: Sequence[str],
        kernels: Sequence[str],
        packed: Path | None = None,
    ) -> None:
        self.key = {
            "method": METHOD,
            "archive": archive,
            "examples": [[list(arg.shape) for arg in args if isinstance(arg, torch.Tensor)] for args in examples],
            "device": _kind_of(device),
            "torch": torch.__version__,
            "modes": sorted(modes),
            "kernels": list(kernels),
            "threads": torch.get_num_threads(),
        }
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"execution-{digest}.json"
        self.packed = packed / self.path.name if packed else None
        self._measurements = 0

    def read(self) -> Choice | None:
        """The stored choice, or the archive's; None if there is none for exactly this key, or it must be measured."""
        for path in (self.path, self.packed):
            choice = self._read(path) if path else None
            if choice:
                return choice
        return None

    def _read(self, path: Path) -> Choice | None:
        try:
            stored = json.loads(path.read_text())
            if stored["key"] != self.key:
                return None
            self._measurements = max(self._measurements, int(stored["measurements"]))
            if not stored["settled"] and self._measurements < MOST_MEASUREMENTS:
                logger.info("the machine was busy when the stored choice was measured: measuring once more")
                return None
            candidates = [Candidate(**row) for row in stored["candidates"]]
            schedule = None if stored["schedule"] is None else dict(stored["schedule"])
            return Choice(str(stored["name"]), str(stored["reason"]), candidates, schedule)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("the stored choice %s can't be read, measuring again: %s", path.name, error)
            return None

    def write(self, choice: Choice, settled: bool) -> None:
        """Store the choice; a folder that can't be written to costs the next start its time, no more.

        Args:
            choice: What was measured.
            settled: Whether the readings agreed; otherwise the next start measures once more.
        """
        measured = {"settled": settled, "measurements": self._measurements + 1}
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"key": self.key, **measured, **asdict(choice)}, indent=1))
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("the choice can't be stored in %s: %s", self.path.name, error)


def _kind_of(device: torch.device) -> dict[str, Any]:
    """What tells a machine on which the same is fastest: the GPU, or the processor and the cores at hand."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)}
    # PyTorch may be told to use fewer instructions than there are.
    return {"cpu": cpu_kind(), "used": torch.backends.cpu.get_cpu_capability(), "cores": cores_at_hand()}
