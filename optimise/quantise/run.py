"""Turns the options of the command into an archive in 8 bits: asked, judged, written and packed, in that order."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from archiver.__main__ import main as archive
from optimise.errors import OptimiseError
from optimise.examples.sources import ask_all, facts_of, open_sources
from optimise.examples.teacher import Teacher
from optimise.gate.judge import Made, settings_of
from optimise.gate.verdict import finish, forget_verdict
from optimise.output.work import opened
from optimise.progress import progress_bar
from vmap_ensemble.archive.settings import SETTINGS_FILE, read_block
from vmap_ensemble.archive.unpack import unpacked
from vmap_ensemble.ensemble import Ensemble

TOOL = "quantise"


def run(options: argparse.Namespace) -> int:
    """Quantise an archive; returns the command's exit code.

    Raises:
        EnsembleError: One line that says what is refused.
    """
    folder = options.output.with_suffix("")
    given = argparse.Namespace(**{**vars(options), "output": folder, "test": None, "held_out": 0.0})
    with unpacked(options.archive) as source:
        run_as = {"device": options.device, "execution": options.execution, "threads": options.threads}
        teacher = Teacher(Ensemble.load(source, batch_sizes=(1, 8), **run_as))
        if teacher.task.calibrates:
            raise OptimiseError(
                f"{options.archive.name}: its inputs aren't texts; images are calibrated when they are packed: "
                "./archive.sh NAME --samples IMAGES --set quantization=int8"
            )
        sources = open_sources(given, teacher)
        made_with = {"tool": TOOL, **facts_of(given, teacher, sources)}
        with progress_bar() as progress, opened(folder, made_with, options.anew) as work:
            parts = ask_all(TOOL, given, teacher, sources, work, progress, learns=False)
        forget_verdict(folder)
        finish(given, teacher, source, _made(teacher, source), parts, folder.name, {}, [])
    return _pack(folder, options.output)


def _made(teacher: Teacher, source: Path) -> Made:
    """The same members, served in 8 bits; what isn't quantised of them is float32, whatever it was."""
    names = teacher.ensemble.names
    states = {name: teacher.build_member(index).state_dict() for index, name in enumerate(names)}
    settings = settings_of(read_block(source), teacher, None, len(names))
    settings |= {"quantization": "int8", "dtype": "fp32", "execution": "auto"}
    return Made("quantised", teacher.build_model(), states, settings, source)


def _pack(folder: Path, output: Path) -> int:
    """Build the archive of a folder's block, which then holds the members a second time: those give way."""
    config = folder / SETTINGS_FILE
    code = archive([folder.name, "--config", str(config), "--output", str(output.parent), "--force"])
    if code == 0:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        shutil.rmtree(folder / ".work", ignore_errors=True)
        config.unlink()
    return code
