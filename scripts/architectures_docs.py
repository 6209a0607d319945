"""Turns a try of every classifier family into docs/architectures.md, so that the page can't say what isn't so.

python -m scripts.architectures_docs            tries them all, minutes, and writes the page
python -m scripts.architectures_docs --check    exits 1 when the page is out of date
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.generated import DOCS, write_or_check

if TYPE_CHECKING:
    from scripts.architecture_sweep import Row

PAGE = DOCS / "architectures.md"
HEAD = """# Architectures

Written by `python -m scripts.architectures_docs`; don't edit it by hand. It archives two small random members of
every family of classifiers that torchvision {torchvision} and transformers {transformers} know, loads the archive and
compares its answers with those of the plain models, one input at a time; a test does the same.

*prepared*: weights reordered for the CPU once, layers fused. *vmap*: one call of vmap for all members. *loop*: one
member after another, which every architecture can. `auto` takes the fastest of those that a row names, and others
that depend on the machine (compiled, CUDA graphs).
"""
IMAGES = """
## Images

The smallest network of each of torchvision's files stands for the others of that file. Rows of a batch are
independent in all of them.

| tried | stands also for | runs as |
| --- | --- | --- |
"""
TEXTS = """
## Texts

Sequence classifiers of transformers, by `model_type`, with a tiny configuration each. *Padding*: what is done about
texts of different lengths in a batch: its tokens are removed before the forward; texts are padded to the longest of
their batch; or texts run one by one, since padding would change the answer.

| model_type | class | runs as | padding |
| --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| model_type | why, in the words of `./archive.sh` or of the start |
| --- | --- |
"""
UNTRIED = """
## Not tried

transformers' own model can't be made small, or wants more than texts.

| model_type | what it raises |
| --- | --- |
"""


def image_line(row: Row) -> str:
    """One row of the table of images."""
    return f"| `{row.name}` | {row.family} | {runs_as(row)} |"


def text_line(row: Row) -> str:
    """One row of the table that a text model belongs into."""
    if row.refused:
        return f"| `{row.name}` | {row.refused.replace('|', '/')} |"
    return f"| `{row.name}` | {row.family} | {runs_as(row)} | {row.padding} |"


def runs_as(row: Row) -> str:
    """The ways that give an architecture's own numbers."""
    return ", ".join([*["prepared"] * row.prepared, *["vmap"] * row.vmap, "loop"])


def render(images: list[Row], texts: list[Row]) -> str:
    """The page of these rows."""
    import torchvision
    import transformers

    versions = {"torchvision": torchvision.__version__.split("+")[0], "transformers": transformers.__version__}
    served = [row for row in texts if not row.refused]
    untried = [row for row in texts if row.is_untried]
    refused = [row for row in texts if row.refused and not row.is_untried]
    parts = [HEAD.format(**versions)]
    for head, rows, line in (
        (IMAGES, images, image_line),
        (TEXTS, served, text_line),
        (REFUSED, refused, text_line),
        (UNTRIED, untried, text_line),
    ):
        if rows:
            parts.append(head + "\n".join(map(line, rows)) + "\n")
    return "".join(parts)


def sweep() -> tuple[list[Row], list[Row]]:
    """A row for every family of images, and one for every family of texts."""
    from scripts.architecture_sweep import image_families, text_families, try_image, try_text

    def tried(function: object, names: list[str]) -> list[Row]:
        rows = []
        for name in sorted(names):
            with tempfile.TemporaryDirectory() as work:
                rows.append(function(name, Path(work)))  # type: ignore[operator]
            print(f"{name:<24}{rows[-1].refused or runs_as(rows[-1])}", flush=True)
        return rows

    return tried(try_image, list(image_families())), tried(try_text, list(text_families()))


def main() -> int:
    """Write the page, or check it."""
    return write_or_check({PAGE.name: lambda: render(*sweep())}, "python -m scripts.architectures_docs", __doc__)


if __name__ == "__main__":
    sys.exit(main())
