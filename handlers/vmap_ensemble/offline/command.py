"""Turns an archive and a folder, table or shard into a file of answers: what `vmap-ensemble predict` does."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmap_ensemble.process.outcome import exit_code
from vmap_ensemble.process.threads import cores_at_hand

if TYPE_CHECKING:
    from vmap_ensemble.ensemble import Ensemble
    from vmap_ensemble.offline.inputs import Rows
    from vmap_ensemble.offline.output import Output

EPILOG = """\
input:
  a folder of images or .txt files; a .csv, .tsv, .jsonl or .parquet table; a .tar shard, or a folder of shards

output:
  .jsonl: one line per row, {"input": NAME, "answer": {...}} or {"input": NAME, "error": {...}}, in order
  .parquet: the same as a table

A run that is cut off goes on where it was when the same command is given again.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble predict",
        description="Answer a folder, a table or tar shards with an archive, without a server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("input", type=Path, metavar="INPUT", help="folder, table or shard")
    add("--output", type=Path, required=True, metavar="FILE", help="answers: .jsonl or .parquet")
    add("--column", metavar="NAME", help="column of the table that holds texts, or paths of images")
    add("--subset", nargs="+", metavar="MEMBER", help="members that are asked; all by default")
    add("--top-k", type=int, metavar="K", help="labels in an answer")
    add("--detail", action="store_true", help="tell what each member says")
    add("--batch-size", type=int, metavar="N", help="rows in a forward; measured by default")
    add("--workers", type=int, metavar="N", help="processes that read and decode; by the cores by default")
    add("--threads", type=int, metavar="N", help="torch's threads; the cores by default")
    add("--device", nargs="+", metavar="DEVICE", help="cpu, cuda:0 ...; several share the rows")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="instead of the archive's")
    add("--execution", metavar="MODE", help="instead of the archive's")
    add("--on", choices=("here", "ray"), default="here", help="where: this machine, or a Ray cluster")
    add("--summary", type=Path, metavar="FILE", help="also write the table at the end as .json or .html")
    add("--force", action="store_true", help="replace an output that exists, begin anew")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "threads", "top_k"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers: expected 0 or more, got {options.workers}")
    if options.on == "ray" and len(options.device or ()) > 1:
        parser.error("--device: expected one with --on ray, which gives each of its processes its own")
    if options.output.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--output: expected a name that ends in .jsonl or .parquet, got {options.output.name}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    return exit_code("predict", lambda: _run(options), "stopped; the same command goes on where it was")


def _run(options: argparse.Namespace) -> int:
    from vmap_ensemble.offline.output import Output

    lines = options.output
    if lines.suffix != ".jsonl":  # a table is made of the lines at the end
        lines = lines.with_name(f"{lines.name}.jsonl")
    _check_parquet(options)
    if options.on == "ray":
        from vmap_ensemble.offline.on_ray import check_ray

        check_ray()
    ensembles = _load(options)
    rows = _open_rows(options, ensembles[0])
    output = Output(lines, _made_with(options, ensembles[0], rows), options.force)
    started = time.perf_counter()
    done = _answer(options, ensembles, rows, output)
    seconds = time.perf_counter() - started
    facts = {
        "archive": options.archive.name,
        "batch_size": output.state["batch_size"],
        "rows_in_this_run": done,
        "seconds": round(seconds, 2),
        "rows_per_s": round(done / seconds, 1) if seconds else 0.0,
    }
    _finish(options, lines, facts)
    return 0


def _check_parquet(options: argparse.Namespace) -> None:
    from vmap_ensemble.offline.output import OutputError
    from vmap_ensemble.offline.tables import import_parquet

    if options.output.suffix != ".parquet":
        return
    import_parquet(options.output.name)  # before minutes of other work
    if options.output.exists() and not options.force:
        raise OutputError(f"{options.output.name}: exists; --force replaces it")


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    """How an ensemble is loaded, but for where from and onto which device."""
    threads = options.threads or max(1, cores_at_hand() // len(options.device or [None]))
    made_for = (1, options.batch_size or 32)
    return {"dtype": options.dtype, "execution": options.execution, "threads": threads, "batch_sizes": made_for}


def _load(options: argparse.Namespace) -> list[Ensemble]:
    from vmap_ensemble.ensemble import Ensemble

    given = _loading(options)
    ensembles = [Ensemble.load(options.archive, device=device, **given) for device in options.device or [None]]
    ensembles[0].check_subset(options.subset)
    return ensembles


def _open_rows(options: argparse.Namespace, ensemble: Ensemble) -> Rows:
    from vmap_ensemble.offline.inputs import open_rows

    task = ensemble.task
    return open_rows(options.input, task.reads_texts, task.item_keys or (), options.column)


def _made_with(options: argparse.Namespace, ensemble: Ensemble, rows: Rows) -> dict[str, Any]:
    """What decides on the lines of the output; what makes them faster or slower doesn't."""
    from vmap_ensemble.many import WINDOW

    return {
        "archive": [member.sha256 for member in ensemble.forward.members.members],
        "input": str(options.input.absolute()),
        "rows": rows.count,
        "column": options.column,
        "subset": options.subset,
        "top_k": options.top_k,
        "detail": options.detail,
        "dtype": ensemble.settings.dtype,
        "window": WINDOW[ensemble.task.reads_texts],
    }


def _answer(options: argparse.Namespace, ensembles: list[Ensemble], rows: Rows, output: Output) -> int:
    """Answer what is left, under a bar; returns the number of rows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vmap_ensemble.many import WINDOW

    before = output.windows * WINDOW[ensembles[0].task.reads_texts]
    answered = _lines(options, ensembles, rows, output)
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("predict", total=rows.count, completed=before)
        for count in output.write(answered):
            done += count
            progress.update(bar, advance=count)
    return done


def _lines(options: argparse.Namespace, ensembles: list[Ensemble], rows: Rows, output: Output) -> Iterator[list[str]]:
    """The lines of the windows that are left."""
    from vmap_ensemble.many import WINDOW, Windows, find_batch, load_windows
    from vmap_ensemble.offline.run import answer_windows
    from vmap_ensemble.tasks.answers import Options

    asked = Options(options.detail, tuple(options.subset) if options.subset else None, options.top_k)
    workers = options.workers if options.workers is not None else _default_workers(ensembles[0])
    loaded = load_windows(Windows(ensembles[0].task, rows, output.windows), 0 if options.on == "ray" else workers)
    first = list(islice(loaded, 1))
    if "batch_size" not in output.state:  # those who go on take that of those who began
        measured = options.batch_size or find_batch(ensembles[0], first[0].examples if first else [], asked)
        output.state["batch_size"] = measured
    if options.on == "here":
        return answer_windows(ensembles, chain(first, loaded), asked, output.state["batch_size"])
    from vmap_ensemble.offline.on_ray import Job, answer_on_ray

    job = Job(
        archive=str(options.archive.absolute()),
        input=options.input.absolute(),
        column=options.column,
        options=asked,
        batch=output.state["batch_size"],
        device=(options.device or [None])[0],
        loading=_loading(options),
    )
    return answer_on_ray(job, rows, output.windows, WINDOW[ensembles[0].task.reads_texts])


def _default_workers(ensemble: Ensemble) -> int:
    """Images are decoded by processes of their own; texts are quicker read than sent from one to another."""
    return 0 if ensemble.task.reads_texts else min(4, cores_at_hand() - 1)


def _finish(options: argparse.Namespace, lines: Path, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vmap_ensemble.offline.output import to_parquet
    from vmap_ensemble.offline.summary import summarise, write_summary

    summary = summarise(lines, facts)
    if options.output.suffix == ".parquet":
        to_parquet(lines, options.output)
        lines.unlink()
    if options.summary:
        write_summary(summary, options.summary)
    table = Table(show_header=False, box=None)
    for name, value in summary.table():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
