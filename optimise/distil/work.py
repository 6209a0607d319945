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

from optimise.distil.errors import DistilError
from optimise.distil.write import write_json

WORK = ".work"


@contextmanager
def opened(output: Path, made_with: Mapping[str, Any], anew: bool) -> Iterator[Path]:
    """The folder of what a run needs to go on; gone again where data of a new one turn out to be refused inside.

    Args:
        output: The folder of the student.
        made_with: What decides on the student.
        anew: Begin again, whatever is there.

    Raises:
        DistilError: It can't be written to, or holds a run that was made with something else.
    """
    work, facts = output / WORK, output / WORK / "made_with.json"
    if output.exists() and not output.is_dir():
        raise DistilError(f"{output}: is a file; --output names a folder")
    if anew:
        shutil.rmtree(work, ignore_errors=True)
    known: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    given = json.loads(json.dumps(made_with))
    for key in given if known else ():
        if known.get(key) != given[key]:
            raise DistilError(
                f"{output}: was made with {key} {known.get(key)!r}, this is {given[key]!r}; --anew begins again, "
                "another --output leaves it"
            )
    if not known and output.is_dir() and any(output.iterdir()) and not anew:
        raise DistilError(f"{output}: holds files that aren't of a run of distil; name another folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_json(facts, given)
    except OSError as error:
        raise DistilError(f"{output}: can't be written to ({error.strerror})") from None
    if not os.access(work, os.W_OK):
        raise DistilError(f"{output}: not writable")
    try:
        yield work
    except DistilError:
        if not known:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds files of the user's
                output.rmdir()
        raise
