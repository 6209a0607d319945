"""Sentences of film reviews with ratings by people, from a package of the index -> tables for training and distil.

    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python -m training.reviews vaderSentiment-0.5.zip --output runs/reviews

writes reviews.tsv, which `python -m training.bert --texts` takes, and learn.csv and test.csv for distil.

Source: Hutto and Gilbert, VADER, ICWSM 2014: 10,605 sentences of Pang and Lee's reviews, each rated by 20 people or
more from -4 to 4; licence of the package: MIT
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import sys
import tarfile
import zipfile
from pathlib import Path

from training.options import SPLITS
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.outcome import exit_code

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "movieReviewSnippets_GroundTruth.txt"
LABELS = ("negative", "positive")
# Sentences whose mean rating is nearer to 0 say neither.
LEAST_RATING = 0.5


def read_sentences(package: Path) -> list[tuple[str, str]]:
    """Label and text of all sentences that people found to be one or the other.

    Raises:
        EnsembleError: It is no such package.
    """
    try:
        with zipfile.ZipFile(package) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith(INNER))
            packed = io.BytesIO(archive.read(inner))
        with tarfile.open(fileobj=packed) as files:
            (name,) = (name for name in files.getnames() if name.endswith(f"/{TABLE}"))
            table = files.extractfile(name)
            lines = table.read().decode("utf-8", "replace").splitlines() if table else []
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise EnsembleError(f"{package.name}: expected vaderSentiment-0.5.zip with {INNER} ({error})") from None
    rows = [line.split("\t", 2) for line in lines]
    rated = [(float(row[1]), " ".join(row[2].split())) for row in rows if len(row) == 3]
    return [(LABELS[rating > 0], text) for rating, text in rated if abs(rating) >= LEAST_RATING and text]


def write_tables(rows: list[tuple[str, str]], learn: int, folder: Path) -> None:
    """The same rows in both forms: `learn` of them to learn from, the others to be judged by."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = [(SPLITS[number >= learn], *row) for number, row in enumerate(rows)]
    with (folder / "reviews.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerows([("split", "label", "text"), *splits])
    for name, split in zip(("learn.csv", "test.csv"), SPLITS, strict=True):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            own = [(label, text) for at, label, text in splits if at == split]
            csv.writer(file).writerows([("label", "text"), *own])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m training.reviews", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("package", type=Path, help="vaderSentiment-0.5.zip")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the tables")
    parser.add_argument("--learn", type=int, default=2000, metavar="N", help="sentences to learn from (2000)")
    parser.add_argument("--test", type=int, default=1000, metavar="N", help="sentences to be judged by (1000)")
    options = parser.parse_args(arguments)

    def run() -> int:
        rows = read_sentences(options.package)
        random.Random(0).shuffle(rows)
        write_tables(rows[: options.learn + options.test], options.learn, options.output)
        print(f"{min(len(rows), options.learn + options.test)} of {len(rows)} sentences -> {options.output}")
        return 0

    return exit_code("reviews", run)


if __name__ == "__main__":
    sys.exit(main())
