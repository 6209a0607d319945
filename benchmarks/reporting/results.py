"""Figures that benchmarks wrote -> tables of text: what README, page and plots show, and nothing typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
    def chip(self) -> str:
        """Chip, cores and versions, the same for all files of one machine."""
        facts = self.figures["machine"]
        return f"{facts.get('gpu') or facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}"

    @property
    def machine(self) -> str:
        """One line: chip, cores, threads, versions, date."""
        facts = self.figures["machine"]
        return f"{self.chip}, {facts['threads']} threads, Python {facts['python']}, {facts['time'][:10]}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        title, note: above and below.
        head, rows: cells.
        command, machine: where it is from.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    command: str
    machine: str
    note: str = ""

    def to_markdown(self) -> str:
        """GitHub's table with its title, command and machine."""
        lines = [f"**{self.title}**", "", _line(self.head), _line(("---",) * len(self.head)), *map(_line, self.rows)]
        source = f"`{self.command}` on {self.machine}."
        return "\n".join([*lines, "", f"{source} {self.note}".rstrip()])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


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


def make_tables(results: list[Result]) -> list[Table]:
    """Every table, in the order that a reader wants."""
    makers = {
        "serve": serve_tables, "forward": forward_tables, "bert": bert_tables, "scaling": scaling_tables,
        "seeds": seeds_tables, "loading": loading_tables,
    }  # fmt: skip
    order = list(makers)
    known = [result for result in results if result.table in makers]
    ranked = sorted(known, key=lambda result: order.index(result.table))
    return [table for result in ranked for table in makers[result.table](result)]


def serve_tables(result: Result) -> Iterator[Table]:
    """One table per network: every rival under every load."""
    rows_of: dict[str, list[tuple[str, ...]]] = {}
    for row in result.figures["rows"]:
        rows = rows_of.setdefault(row["handler"], [])
        if "left_out" in row:
            rows.append((str(row["members"]), row["rival"], "", f"left out: {row['left_out']}", *[""] * 5))
            continue
        load = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.1f}/s arrive"
        unanswered = ", ".join(f"{count} {reason}" for reason, count in row["errors"].items()) or "0"
        rows.append((
            str(row["members"]), row["rival"], load, f"{row['requests_per_s']:.1f}", _ms(row["p50_ms"]),
            _ms(row["p99_ms"]), unanswered, f"{row['worker_mib']:.0f} MiB", f"{row['java_mib']:.0f} MiB",
        ))  # fmt: skip
    head = ("N", "served as", "load", "requests/s", "p50", "p99", "errors", "workers' memory", "Java's")
    texts = "; ".join(f"*{name}*: {text}" for name, text in result.figures["rivals"].items())
    setting = result.figures["setting"]
    note = (
        f"All with batchSize {setting['batch_size']}, maxBatchDelay {setting['delay_ms']} ms, and together as many "
        f"torch threads as cores, at least one a worker. A TimeoutError is a request without an answer. {texts}."
    )
    for handler, rows in rows_of.items():
        yield Table(f"Served under load: {handler}", head, rows, result.command, result.machine, note)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def forward_tables(result: Result) -> Iterator[Table]:
    """One table: every rival as a column, its speed relative to the loop."""
    names: list[str] = []
    cells = [cell for cell in result.figures["cells"] if cell["rows"]]
    for cell in cells:
        names += [row["rival"] for row in cell["rows"] if row["rival"] not in names]
    rows = []
    for cell in cells:
        by_name = {row["rival"]: row for row in cell["rows"]}
        ratios = [_ratio(by_name.get(name)) for name in names if name != "loop"]
        ours = by_name.get("ours_auto", {})
        rows.append((
            cell["network"], str(cell["members"]), str(cell["batch"]), f"{by_name['loop']['median_ms']:.2f} ms",
            *ratios, f"{ours['times_roofline']:.1f}x" if "times_roofline" in ours else "-",
        ))  # fmt: skip
    rivals = [name.replace("_", " ") for name in names if name != "loop"]
    head = ("network", "N", "batch", "loop", *rivals, "ours auto: time / roofline")
    note = (
        "Medians in turns in one process; the other columns are the loop's time divided by theirs, so below 1 is "
        "slower than the loop. Roofline: the least time that the plain arithmetic and all weights need at ceilings "
        "measured in the run. A dash: it refused, see the file."
    )
    for cell in result.figures["cells"]:
        if "left_out" in cell:
            note += f" {cell['network']} x {cell['members']}, batch {cell['batch']}: {cell['left_out']}."
    yield Table("One forward of all members", head, rows, result.command, result.machine, note)


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or "left_out" in row:
        return "-"
    return f"{row['ratio']:.2f}" + ("" if row["equal"] else " (differs)")


def bert_tables(result: Result) -> Iterator[Table]:
    """Real MiniLM weights with and without padding; heads on one trunk."""
    batches = result.figures["batches"]
    head = ("batch", "way", "median", "p10 to p90", "first row = 1", "difference")
    rows = [
        (f"{batch['batch']}: {batch['tokens']} tokens in {batch['texts']} texts", *_bert_row(row))
        for batch in batches for row in batch["rows"]
    ]  # fmt: skip
    title = f"MiniLM's encoder, {result.figures['members']} members"
    yield Table(title, head, rows, result.command, result.machine)
    trunk = result.figures.get("trunk", [])
    if trunk:
        rows = [(f"{table['texts']} texts", *_bert_row(row)) for table in trunk for row in table["rows"]]
        yield Table(f"{trunk[0]['heads']} heads on one trunk", head, rows, result.command, result.machine)


def _bert_row(row: dict[str, Any]) -> tuple[str, ...]:
    spread = f"{row['p10_ms']:.2f} to {row['p90_ms']:.2f}"
    return (
        row["rival"], f"{row['median_ms']:.2f} ms", spread, f"{row['ratio']:.2f}", f"{row['largest_difference']:.0e}"
    )  # fmt: skip


def scaling_tables(result: Result) -> Iterator[Table]:
    """What a member adds."""
    rows = []
    for table in result.figures["networks"]:
        fits, last = table["fits"], table["rows"][-1]
        rows.append((
            table["network"], f"{table['rows'][0]['members']} to {last['members']}",
            f"{fits['loop_ms']['slope']:.2f} ms", f"{fits['ours_ms']['slope']:.2f} ms",
            f"{fits['stack_mib']['slope']:.1f} MiB", f"{fits['rss_mib']['slope']:.1f} MiB",
            f"{fits['peak_mib']['slope']:.1f} MiB", f"{fits['ours_ms']['r2']:.3f}",
        ))  # fmt: skip
    head = ("network", "N", "loop", "ours", "weights", "resident", "peak", "r² of ours")
    note = "Slopes of least-squares lines through the sizes, batch 1: what one more member costs."
    yield Table("What a member adds", head, rows, result.command, result.machine, note)


def seeds_tables(result: Result) -> Iterator[Table]:
    """Ratios of loop to vmap here and published."""
    rows = []
    for cell in result.figures["cells"]:
        by_name = {row["rival"]: row for row in cell["rows"]}
        ratios = (_ratio(by_name.get("stock_vmap")), _ratio(by_name.get("ours_auto")))
        rows.append((cell["network"], *ratios, f"{cell['published_ratio']:g}"))
    where = result.figures["cells"][0]["published_on"]
    note = f"Two members, batch 1. Published on {where}: other hardware and software, not rivals of these figures."
    head = ("network", "loop / stock vmap", "loop / ours", "published loop / vmap")
    yield Table("The published setting", head, rows, result.command, result.machine, note)


def loading_tables(result: Result) -> Iterator[Table]:
    """Memory of loading against its bound, and seconds per phase."""
    figures = result.figures
    phases = [(name, f"{seconds:.2f} s") for name, seconds in figures["phases_s"].items()]
    sizes = [(f"{name} memory", f"{figures[f'{name}_mib']:.0f} MiB") for name in ("stack", "peak", "bound")]
    title = f"Loading {figures['members']} x {figures['architecture']}"
    yield Table(title, ("phase", "figure"), [*phases, *sizes], result.command, result.machine)


def gpu_note(results: list[Result]) -> str:
    """Says which GPU was measured, or that none was."""
    chips = sorted({result.figures["machine"]["gpu"] for result in results if "gpu" in result.figures["machine"]})
    return f"GPU: {', '.join(chips)}." if chips else NO_GPU
