"""Turns precision.json of an archive into what its precision costs on samples, and the ranges that int8 needs.

`./archive.sh --samples` measures both and writes the file; a worker reads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmap_ensemble.errors import LoadError

PRECISION_FILE = "precision.json"
PRECISION_FORMAT = 1


@dataclass(frozen=True)
class Precision:
    """What precision.json says.

    Attributes:
        name: `int8`, `fp16` or `bf16`.
        samples: How many inputs the archive was judged on.
        changed_predictions: How many of them have another first class than in float32.
        largest_probability_difference: To float32, over all samples and classes, 0 to 1.
        members: Names, in the order of the ranges; empty without ranges.
        ranges: For int8: value -> (lowest, highest) per member, or one pair where all members share the value.
    """

    name: str
    samples: int
    changed_predictions: int
    largest_probability_difference: float
    members: Sequence[str] = ()
    ranges: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """All but the ranges, for the description of the model."""
        keys = ("name", "samples", "changed_predictions", "largest_probability_difference")
        return {key: getattr(self, key) for key in keys}

    def write(self, folder: Path) -> None:
        """Write precision.json into a folder."""
        rows = {"format": PRECISION_FORMAT, **dataclasses.asdict(self)}
        (folder / PRECISION_FILE).write_text(json.dumps(rows) + "\n", encoding="utf-8")


def read_precision(folder: Path) -> Precision | None:
    """Read precision.json of an unpacked archive; None where there is none.

    Raises:
        LoadError: It is malformed.
    """
    path = Path(folder) / PRECISION_FILE
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows.pop("format") != PRECISION_FORMAT:
            raise ValueError(f"its format isn't {PRECISION_FORMAT}")
        return Precision(**rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{PRECISION_FILE}: malformed ({error}); build the archive again") from None
