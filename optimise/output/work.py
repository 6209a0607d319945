"""Turns an output folder into a place where a run goes on, and never into one of something else.

runs/student/.work/made_with.json    archive, data and options; a run with others is refused
runs/student/.work/learn.*           examples and what the ensemble says of them
runs/student/.work/training.pt       student, optimiser and epoch
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optimise.errors import OptimiseError
from optimise.output.write import write_json
from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.errors import EnsembleError

WORK, REPORT, PAGE = ".work", "report.json", "report.html"


def _clear(output: Path) -> None:
    """Remove what an earlier run has written: its members would stand beside those of the next."""
    shutil.rmtree(output / WORK, ignore_errors=True)
    for path in (*output.glob("*.safetensors"), *(output / name for name in (REPORT, PAGE, SETTINGS_FILE))):
        path.unlink(missing_ok=True)


@contextmanager
def opened(output: Path, made_with: Mapping[str, Any], anew: bool) -> Iterator[Path]:
    """The folder of what a run needs to go on; gone again where data of a new one turn out to be refused inside.

    Args:
        output: The folder.
        made_with: What decides on what is made; the tool's name among it.
        anew: Begin again, whatever is there.

    Raises:
        OptimiseError: It can't be written to, or holds a run that was made with something else.
    """
    work, facts = output / WORK, output / WORK / "made_with.json"
    if output.exists() and not output.is_dir():
        raise OptimiseError(f"{output}: is a file; --output names a folder")
    is_ours = facts.is_file()
    if anew and is_ours:
        _clear(output)
    known: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    given = json.loads(json.dumps(made_with))
    for key in given if known else ():
        if known.get(key) != given[key]:
            raise OptimiseError(
                f"{output}: was made with {key} {known.get(key)!r}, this is {given[key]!r}; --anew begins again, "
                "another --output leaves it"
            )
    if not is_ours and output.is_dir() and any(output.iterdir()):
        raise OptimiseError(f"{output}: holds files that aren't of a run of this tool; name another folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_json(facts, given)
    except OSError as error:
        raise OptimiseError(f"{output}: can't be written to ({error.strerror})") from None
    if not os.access(work, os.W_OK):
        raise OptimiseError(f"{output}: not writable")
    try:
        yield work
    except EnsembleError:
        if not known:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds files of the user's
                output.rmdir()
        raise
