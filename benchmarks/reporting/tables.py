"""Results -> tables of text: what README and pages show, and nothing typed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reporting.names import AUTO, SCORES, SERVED, name_network, name_rival
from benchmarks.reporting.results import Result


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
        source = f"`{self.command}` on {self.machine}."
        return "\n\n".join([f"**{self.title}**", self.cells_to_markdown(), f"{source} {self.note}".rstrip()])

    def cells_to_markdown(self) -> str:
        """GitHub's table alone."""
        return "\n".join([_line(self.head), _line(("---",) * len(self.head)), *map(_line, self.rows)])


def _line(cells: tuple[str, ...]) -> str:
    # Reasons why a rival was left out come from others' libraries: a bar or a tag in them is text.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def make_tables(results: list[Result]) -> list[Table]:
    """Every table, in the order that a reader wants."""
    makers = {
        "serve": serve_tables, "forward": forward_tables, "bert": bert_tables, "scaling": scaling_tables,
        "seeds": seeds_tables, "loading": loading_tables, "uncertainty": uncertainty_tables,
    }  # fmt: skip
    order = list(makers)
    known = [result for result in results if result.table in makers]
    ranked = sorted(known, key=lambda result: order.index(result.table))
    return [table for result in ranked for table in makers[result.table](result)]


def serve_tables(result: Result) -> Iterator[Table]:
    """One table per network: every rival under every load."""
    rows_of: dict[str, list[tuple[str, ...]]] = {}
    for row in result.figures["rows"]:
        rows = rows_of.setdefault(name_network(row["handler"]), [])
        name = bold_ours(SERVED.get(row["rival"], row["rival"]))
        if "left_out" in row:
            rows.append((str(row["members"]), name, "", f"left out: {row['left_out']}", *[""] * 5))
            continue
        load = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.1f}/s arrive"
        unanswered = ", ".join(f"{count} {reason}" for reason, count in row["errors"].items()) or "0"
        rows.append((
            str(row["members"]), name, load, f"{row['requests_per_s']:.1f}", _ms(row["p50_ms"]),
            _ms(row["p99_ms"]), unanswered, f"{row['worker_mib']:.0f} MiB", f"{row['java_mib']:.0f} MiB",
        ))  # fmt: skip
    head = ("N", "served as", "load", "requests/s", "p50", "p99", "errors", "workers' memory", "Java's")
    setting = result.figures["setting"]
    note = (
        f"All with batchSize {setting['batch_size']}, maxBatchDelay {setting['delay_ms']} ms, and together as many "
        f"torch threads as cores, at least one a worker. A TimeoutError is a request without an answer."
    )
    for handler, rows in rows_of.items():
        yield Table(f"Served under load: {handler}", head, rows, result.command, result.machine, note)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def forward_tables(result: Result) -> Iterator[Table]:
    """One table: every rival as a column, its speed relative to the loop; `auto` first, where a phone shows it."""
    names = [AUTO]
    cells = [cell for cell in result.figures["cells"] if cell["rows"]]
    for cell in cells:
        names += [row["rival"] for row in cell["rows"] if row["rival"] not in names]
    others = [name for name in names if name not in ("loop", AUTO)]
    rows = []
    for cell in cells:
        by_name = {row["rival"]: row for row in cell["rows"]}
        ours = by_name.get(AUTO, {})
        rows.append((
            name_network(cell["network"]), str(cell["members"]), str(cell["batch"]),
            f"{by_name['loop']['median_ms']:.2f} ms",
            f"**{_ratio(ours)}**", f"{ours['times_roofline']:.1f}x" if "times_roofline" in ours else "-",
            *(_ratio(by_name.get(name)) for name in others),
        ))  # fmt: skip
    head = ("network", "N", "batch", "loop", name_rival(AUTO), "its time / roofline", *map(name_rival, others))
    note = (
        "Medians in turns in one process; the other columns are the loop's time divided by theirs, so below 1 is "
        "slower than the loop. Roofline: the least time that the plain arithmetic and all weights need at ceilings "
        "measured in the run. A dash: it refused, see the file."
    )
    for cell in result.figures["cells"]:
        if "left_out" in cell:
            note += (
                f" {name_network(cell['network'])} x {cell['members']}, batch {cell['batch']}: {cell['left_out']}."
            )
    yield Table("One forward of all members", head, rows, result.command, result.machine, note)


def _ratio(row: dict[str, Any] | None) -> str:
    if not row or "left_out" in row:
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
        bold_ours(name_rival(row["rival"])), f"{row['median_ms']:.2f} ms", spread,
        f"{row['ratio']:.2f}", f"{row['largest_difference']:.0e}",
    )  # fmt: skip


def scaling_tables(result: Result) -> Iterator[Table]:
    """What a member adds."""
    rows = []
    for table in result.figures["networks"]:
        fits, last = table["fits"], table["rows"][-1]
        rows.append((
            name_network(table["network"]), f"{table['rows'][0]['members']} to {last['members']}",
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
        ratios = (_ratio(by_name.get("stock_vmap")), f"**{_ratio(by_name.get(AUTO))}**")
        rows.append((name_network(cell["network"]), *ratios, f"{cell['published_ratio']:g}"))
    where = result.figures["cells"][0]["published_on"]
    note = f"Two members, batch 1. Published on {where}: other hardware and software, not rivals of these figures."
    head = ("network", "loop / stock vmap", "loop / ours: auto", "published loop / vmap")
    yield Table("The published setting", head, rows, result.command, result.machine, note)


def loading_tables(result: Result) -> Iterator[Table]:
    """Memory of loading against its bound, and seconds per phase."""
    figures = result.figures
    phases = [(name, f"{seconds:.2f} s") for name, seconds in figures["phases_s"].items()]
    sizes = [(f"{name} memory", f"{figures[f'{name}_mib']:.0f} MiB") for name in ("stack", "peak", "bound")]
    title = f"Loading {figures['members']} x {name_network(figures['architecture'])}"
    yield Table(title, ("phase", "figure"), [*phases, *sizes], result.command, result.machine)


def uncertainty_tables(result: Result) -> Iterator[Table]:
    """Every score on every kind of unlike inputs, and the mutual information itself."""
    figures = result.figures
    alarms = f"{figures['false_alarms']:.0%}"
    rows, best = [], []
    for kind in figures["unlike"]:
        rows += [_score_row(kind["inputs"], row) for row in kind["scores"]]
        first = max(kind["scores"], key=lambda row: row["auroc"])
        best.append(f"*{kind['inputs']}*: {SCORES[first['score']][0]}")
    trained = figures["trained"]
    note = (
        f"{figures['members']} members"
        + (f", {trained['epochs']} passes over {trained['images']} images each" if trained else "")
        + f"; on {figures['digits']['count']} held-out digits one is right {figures['member_accuracy']:.1%} of the "
        f"time, all together {figures['ensemble_accuracy']:.1%}. Largest AUROC of {'; of '.join(best)}."
    )
    head = ("inputs", "score", "AUROC", f"found where {alarms} of digits are refused", "of single members")
    yield Table("Telling unlike inputs from digits", head, rows, result.command, result.machine, note)
    rows = [
        (kind["inputs"], str(kind["count"]), *(f"{kind[key]:.4f}" for key in ("p10_nats", "median_nats", "p90_nats")))
        for kind in (figures["digits"], *figures["unlike"])
    ]
    note = f"The threshold that refuses {alarms} of the digits is {figures['threshold_nats']:.4f} nats."
    head = ("inputs", "count", "p10", "median", "p90")
    yield Table("Mutual information, in nats", head, rows, result.command, result.machine, note)


def _score_row(inputs: str, row: dict[str, Any]) -> tuple[str, ...]:
    single = row["score"] == "member_probability"
    spread = f"AUROC {row['least_auroc']:.3f} to {row['greatest_auroc']:.3f}" if single else ""
    return (inputs, SCORES[row["score"]][0], f"{row['auroc']:.3f}", f"{row['found']:.1%}", spread)


def bold_ours(name: str) -> str:
    """Mark what is this project's in a column of names."""
    return f"**{name}**" if name.startswith("ours") or name.endswith(", ours") else name
