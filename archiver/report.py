"""Turns a survey or a finished archive into tables for a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from archiver.checking.precision import describe
from archiver.members.survey import Survey
from archiver.texts.traced import TracedMembers
from vmap_ensemble.archive.manifest import Manifest, hash_file
from vmap_ensemble.archive.precision import Precision
from vmap_ensemble.process.device import DTYPES

SHORT = 12


def show_survey(console: Console, name: str, survey: Survey) -> None:
    """Before packing: members, what they share, and the memory of the stack."""
    _show_sources(console, name, survey)
    kept = survey.kept_keys()
    shared = [key for key in kept if key in survey.shared]
    console.print(
        f"tensors: {len(kept)}, of which {len(shared)} ({show_bytes(survey.shared_bytes())}) are identical "
        f"in all members; tied: {len(survey.ties)}"
    )
    sizes = ", ".join(f"{dtype} {show_bytes(survey.stacked_bytes(DTYPES[dtype]))}" for dtype in DTYPES)
    console.print(f"memory when stacked: {sizes}")
    if survey.left_out:
        text = f"left out, since the architecture has no use for them: {_few(survey.left_out)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not survey.architecture_checked:
        console.print("no architecture is named: the handler checks the members against its own at load")
    if len(survey.states) > 1 and not survey.own_keys():
        console.print("[yellow]all members are identical: the ensemble says what one of them says[/yellow]")


def show_traced(console: Console, name: str, traced: TracedMembers) -> None:
    """Before packing: traced members and their library."""
    _show_sources(console, name, traced)
    size = show_bytes(traced.library.stat().st_size)
    console.print(f"library: {traced.library_name}, {size}", markup=False, highlight=False)
    console.print(
        "traced members are code: it runs when the archive is loaded once, at the end; --no-check runs none"
    )


def _show_sources(console: Console, name: str, survey: Survey | TracedMembers) -> None:
    table = Table(title=f"{name}: {len(survey.sources)} members", title_justify="left")
    for column in ("member", "source", "size", "SHA-256"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for source, digest in zip(survey.sources, survey.hashes, strict=True):
        table.add_row(source.name, source.shown, show_bytes(source.path.stat().st_size), digest[:SHORT])
    console.print(table)


def _few(keys: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


def show_precision(console: Console, found: Precision | None) -> None:
    """After the samples were run: what the precision costs."""
    line = describe(found) if found else "samples: not used, float32 members are served as they are"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_note(console: Console, text: str) -> None:
    """What was found and is left to a person."""
    console.print(f"note: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def show_kernels(console: Console, reason: str | None) -> None:
    """While packing: why the kernels of our own aren't in the archive, if they aren't."""
    if reason is not None:
        text = f"packed without kernels of our own, so convolutions will be slower: {reason}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def show_archive(console: Console, path: Path, manifest: Manifest, runs: Sequence[tuple[str, str]] = ()) -> None:
    """After packing: what was made, and how it runs."""
    table = Table(title="archive", title_justify="left", show_header=False)
    table.add_row("path", str(path))
    table.add_row("size", show_bytes(path.stat().st_size))
    table.add_row("members", ", ".join(member.name for member in manifest.members))
    table.add_row("SHA-256", hash_file(path))
    for row in runs:
        table.add_row(*map(escape, row))
    console.print(table)


def show_tuned(console: Console, path: Path, told: str, kinds: int) -> None:
    """After tuning: what is fastest here, and for how many kinds of machine the archive knows."""
    table = Table(title="tuned", title_justify="left", show_header=False)
    table.add_row("path", str(path))
    table.add_row("here", escape(told))
    table.add_row("choices kept", str(kinds))
    table.add_row("SHA-256", hash_file(path))
    console.print(table)


def show_bytes(count: int) -> str:
    """1536 -> 1.5 KiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
