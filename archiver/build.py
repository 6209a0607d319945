"""Turns one ArchiveRequest into one .mar: check everything, show it, pack it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from archiver.blocks import ArchiveRequest
from archiver.handler_facts import check_block, load_handler
from archiver.pack import pack_archive, settings_of, target_path
from archiver.report import show_archive, show_survey
from archiver.resolve import resolve_members
from archiver.survey import survey_members
from vmap_ensemble.errors import ArchiveError

Step = Callable[[str], None]


def build_archive(request: ArchiveRequest, output: Path, force: bool, console: Console) -> Path:
    """Build one archive and print what went in and what came out.

    Args:
        request: What the archive is made of.
        output: Folder of the archive, the model store.
        force: Replace an archive that exists.
        console: Where reports and progress go.

    Returns:
        The path of the archive.

    Raises:
        EnsembleError: One line that says what is refused; the archive that was there is untouched.
    """
    target = target_path(output, request.name, force)
    for path in (request.labels, request.model_config, request.model_file):
        if path is not None and not path.is_file():
            raise ArchiveError(f"'{request.name}': {path.name}: no such file")
    handler = load_handler(request.handler)
    check_block(request.settings, handler, f"setup_config.json, block '{request.name}'")
    request = _with_architecture(request, handler.default_architecture)
    sources = resolve_members(request.members, request.folder)
    with _progress(console, f"check {request.name}", 2 * len(sources) + 1) as step:
        survey = survey_members(
            sources,
            str(request.settings.get("architecture", "")),
            request.settings.get("num_classes"),
            request.model_file.parent if request.model_file else None,
            request.allow_nan,
            step,
        )
    check_block(settings_of(request, survey.num_classes), handler, f"archive '{request.name}'")
    show_survey(console, request.name, survey)
    with _progress(console, f"pack {request.name}", len(sources) + 2) as step:
        manifest = pack_archive(request, survey, target, step)
    show_archive(console, target, manifest)
    return target


def _with_architecture(request: ArchiveRequest, default: str) -> ArchiveRequest:
    if request.settings.get("architecture") or not default:
        return request
    return dataclasses.replace(request, settings={**request.settings, "architecture": default})


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Step]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=f"{title}: {text}")

        yield step
