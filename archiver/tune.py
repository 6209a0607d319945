"""Turns an archive into the same one that also knows how its forward is run fastest on this kind of machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from archiver.checking.check import TUNE_BUDGET_S, load_stage, unpack
from archiver.packing.pack import private_folder, write_mar
from archiver.report import show_tuned
from vmap_ensemble.archive.modes import CHOICES_FOLDER
from vmap_ensemble.errors import ArchiveError


def tune_archive(target: Path, console: Console, debug: bool = False) -> None:
    """Measure an archive on this machine and add the choice to it; those of other kinds of machine stay.

    Args:
        target: The .mar; it is replaced in one step.
        console: Where it is said what was chosen.
        debug: Print the log of an archive that can't be loaded.

    Raises:
        ArchiveError: It can't be read, loaded or written, or nothing was chosen: it is run in one way whatever the
            machine. The archive is untouched.
    """
    with private_folder(target) as work:
        stage, others = work / "stage", work / "others"
        try:
            unpack(target, stage)
            choices = stage / CHOICES_FOLDER
            if choices.is_dir():
                choices.rename(others)  # or the one of this machine would be kept instead of measured anew
            told = load_stage(target.name, stage, console if debug else None, budget_s=TUNE_BUDGET_S)
            found = sorted(path.name for path in choices.glob("*.json"))
            if not found:
                raise ArchiveError(f"{target.name}: --tune: nothing to choose: {told}")
            if others.is_dir():
                shutil.copytree(choices, others, dirs_exist_ok=True)
                shutil.rmtree(choices)
                others.rename(choices)
            built = work / target.name
            write_mar(built, stage)
            os.replace(built, target)
        except OSError as error:
            raise ArchiveError(f"{target.name}: can't be written ({error})") from None
        show_tuned(console, target, told, len(list(choices.glob("*.json"))))
