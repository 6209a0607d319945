"""Results -> pages of docs/benchmarks/: one per network or question, each with plots, tables, commands and chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.jobs import JOBS, Job
from benchmarks.reporting.results import Result
from benchmarks.reporting.tables import make_tables

WRITTEN = "<!-- written by python -m benchmarks.report; don't edit it by hand -->"
FORWARD = (
    "Every way to run the members on one batch, measured in turns in one process. Speeds are relative to the loop, "
    "which is 1; `auto`, what an archive serves by default, has a black edge. The thin lines go from the tenth to "
    "the ninetieth percentile of a rival's own times. [What the rivals are](../benchmarks.md#the-rivals)."
)


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        name: of its file, without the ending.
        title: its heading.
        about: what is measured, for readers.
        jobs: name of a job -> heading of its part; empty where the page has one part.
    """

    name: str
    title: str
    about: str
    jobs: Mapping[str, str]

    @property
    def file(self) -> str:
        """Name of the file in docs/benchmarks."""
        return f"{self.name}.md"


PAGES = (
    Page(
        "uncertainty",
        "Uncertainty: digits against inputs unlike them",
        "What an ensemble is for: its answer says when not to be believed. Members trained on digits see digits of "
        "the test set, and three kinds of inputs that are none. Above: their mutual information. Below: how many of "
        "the unlike inputs a threshold finds, against how many digits it refuses; a score that guesses lies on the "
        "diagonal. *AUROC* is the chance that an unlike input has the higher score than a digit. *Found* is the "
        "share of unlike inputs above the threshold that refuses the stated share of digits, as "
        "`abstain_above_mutual_information` does.",
        {"uncertainty": ""},
    ),
    Page(
        "mnist",
        "MNIST: one forward of N members",
        FORWARD,
        {"forward-mnist-trained": "Trained weights, digits", "forward-mnist": "Random weights, noise"},
    ),
    Page("resnet18", "ResNet-18: one forward of N members", FORWARD, {"forward-resnet18": ""}),
    Page("resnet50", "ResNet-50: one forward of N members", FORWARD, {"forward-resnet50": ""}),
    Page("minilm", "MiniLM: one forward of N members", FORWARD, {"forward-minilm": ""}),
    Page("bert-base", "BERT-base: one forward of N members", FORWARD, {"forward-bert": ""}),
    Page(
        "padding",
        "MiniLM: texts of different lengths, and heads on one trunk",
        "Real weights of MiniLM. A *ragged* batch has texts of different lengths, which others pad; a *single* one "
        "has one text; in a *full* one there is nothing to pad. Heads on one trunk are members that share all "
        "layers but the last. The thin lines go from the tenth to the ninetieth percentile. [What the rivals "
        "are](../benchmarks.md#the-rivals).",
        {"bert": ""},
    ),
    Page(
        "gpu",
        "On a GPU: one forward of N members",
        FORWARD,
        {"gpu": ""},
    ),
    Page(
        "serving",
        "Serving: a real TorchServe under load",
        "Requests per second, latencies and memory of one archive against the other ways to serve N members. Lines "
        "on requests per second: the slowest and the fastest round. Bars of latency: the median, with a line to the "
        "ninetieth percentile, from the tenth where the file has it, and a dot for the ninety-ninth. [What the "
        "rivals are](../benchmarks.md#the-rivals).",
        {
            "serve": "ResNet-18, every rival",
            "serve-mnist": "MNIST, every rival",
            "serve-sizes": "ResNet-18, from one member to many",
        },
    ),
    Page(
        "scaling",
        "What one more member costs",
        "Time and memory against the number of members, with the line that fits them best. The thin lines go from "
        "the tenth to the ninetieth percentile.",
        {"scaling": ""},
    ),
    Page(
        "loading",
        "Loading: seconds by phase, and memory",
        "What a worker does before its first answer. *bound* is the peak that loading promises not to exceed: the "
        "process as it was, the stack of all members, and one member.",
        {"loading": ""},
    ),
    Page(
        "published",
        "The published setting: two members, one input",
        "The ratios that were published of vmapped ensembles, beside the same ratios here. They are of other "
        "hardware and software, and no rivals. The thin lines go from the tenth to the ninetieth percentile.",
        {"seeds": ""},
    ),
)


def write_pages(results: list[Result]) -> dict[str, str]:
    """Name of the file -> its text, of every page; one without results says which command makes them."""
    return {page.file: write_page(page, results) for page in PAGES}


def write_page(page: Page, results: list[Result]) -> str:
    """One page: a part for each result, jobs in the page's order, then chips."""
    parts = [WRITTEN, f"# {page.title}", page.about]
    for job, heading in page.jobs.items():
        own = [result for result in results if result.job == job]
        for result in own:
            title = f"{heading}: {result.chip_and_cores}" if heading else result.chip_and_cores
            parts += [f"## {title}", *write_result(page, result)]
        if not own:
            known = next(known for known in JOBS if known.name == job)
            parts += [
                f"## {heading or 'Measurements'}",
                "Not measured yet. This measures it:",
                f"    {known.command}",
            ]
            parts += list_settings(known)
    return "\n\n".join(parts) + "\n"


def write_result(page: Page, result: Result) -> list[str]:
    """Plot, tables, command and machine of one file."""
    plot = f"../plots/{result.name}.png"
    parts = [f"[![{page.title}, on {result.chip_and_cores}]({plot})]({plot})"]  # a phone shows it whole when touched
    tables = make_tables([result])
    for table in tables:
        if len(tables) > 1:
            parts.append(f"### {table.title}")
        parts.append(table.cells_to_markdown())
        if table.note:
            parts.append(table.note)
    source = f"On {result.machine}, from [{result.name}.json](../../benchmarks/results/{result.name}.json), by"
    return [*parts, source, f"    {result.command}"]


def list_settings(job: Job) -> list[str]:
    """A table of what a job will measure, where it tells: no row is left out because nobody has measured it."""
    rows = [f"| {setting} | not yet measured |" for setting in job.settings]
    return ["\n".join(["| setting | time |", "| --- | --- |", *rows])] if rows else []


def list_pages() -> str:
    """A list of all pages, with links as docs/benchmarks.md needs them."""
    return "\n".join(f"- [{page.title}](benchmarks/{page.file})" for page in PAGES)
