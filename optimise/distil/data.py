"""Turns a folder, a table or MNIST's files into rows that a task reads, and the class of each where it is known.

folder/label/*.png        the folder's name is the label         folder/*.png         no labels
.csv .tsv .jsonl .parquet columns of paths and labels            MNIST's idx files    as training/mnist_data.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from optimise.distil.errors import DistilError
from optimise.distil.idx import TRAIN, holds_idx, read_part
from optimise.distil.losses import UNLABELLED
from vmap_ensemble.errors import ItemError
from vmap_ensemble.many import Row
from vmap_ensemble.offline.inputs import COLUMNS, InputError, Rows, open_rows

LABEL_COLUMN = "label"
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SHOWN_LABELS = 8


@dataclass(frozen=True)
class Data:
    """What a student learns from or is judged by.

    Attributes:
        rows: Names and items.
        labels: The class of each row, UNLABELLED where there is none.
    """

    rows: Rows
    labels: list[int] | None

    @property
    def count(self) -> int | None:
        """Rows, where that is known."""
        return self.rows.count


@dataclass(frozen=True)
class Classes:
    """The classes that the members know.

    Attributes:
        count: How many.
        names: Class number -> label, where the archive has labels.
    """

    count: int
    names: Mapping[int, str]

    def find(self, label: str, where: str) -> int:
        """The number of a label: by its name, or its number where no class has that name.

        Raises:
            DistilError: No member knows it.
        """
        for number, name in self.names.items():
            if name == label:
                return number
        if label.isdecimal() and int(label) < self.count:
            return int(label)
        known = [self.names.get(number, str(number)) for number in range(min(self.count, SHOWN_LABELS))]
        more = f", ... ({self.count})" if self.count > SHOWN_LABELS else ""
        raise DistilError(f"{where}: label '{label[:80]}': no member knows it; they know {', '.join(known)}{more}")


def open_data(
    path: Path,
    classes: Classes,
    column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    part: str = TRAIN,
) -> Data:
    """The rows of a folder or table, and their labels.

    Args:
        path: Where they are.
        classes: What labels may be.
        column: The column of a table that holds paths of images; see `open_rows`.
        label_column: The column that holds labels; by default `label`, where there is one.
        labelled: Whether labels are looked for.
        part: Which of MNIST's files: TRAIN or TEST.

    Raises:
        DistilError: A label is unknown to the members, or an idx file is damaged.
        InputError: There is no such file, no row, or no such column.
    """
    if holds_idx(path, part):
        return _open_idx(path, part, classes if labelled else None)
    if column is None and path.suffix == ".jsonl":
        column = _first_key(path)
    rows = open_rows(path, False, (), column)
    if not labelled:
        return Data(rows, None)
    if path.is_dir():
        return Data(rows, _labels_of_folders(path, rows, classes))
    return Data(rows, _labels_of_table(path, label_column, classes) if path.suffix in TABLES else None)


def _open_idx(folder: Path, part: str, classes: Classes | None) -> Data:
    images, labels = read_part(folder, part)

    def read() -> Iterator[Row]:
        return (Row(f"{part} {number}", Image.fromarray(image)) for number, image in enumerate(images))

    found = [classes.find(str(label), folder.name) for label in labels] if classes else None
    return Data(Rows(read, len(images)), found)


def _labels_of_folders(path: Path, rows: Rows, classes: Classes) -> list[int] | None:
    """The name of the folder that each file lies in; None where all lie in the root."""
    folders = [PurePosixPath(row.name).parent.name for row in rows]
    if not any(folders):
        return None
    numbers = {name: classes.find(name, path.name) for name in dict.fromkeys(folders) if name}
    return [numbers.get(name, UNLABELLED) for name in folders]


def _labels_of_table(path: Path, column: str | None, classes: Classes) -> list[int] | None:
    if path.suffix == ".jsonl" and column is None and not isinstance(_first_item(path), dict):
        return None  # items as they are
    try:
        values = [row.item for row in open_rows(path, True, (), column or LABEL_COLUMN)]
    except InputError:
        if column is None:
            return None
        raise
    if all(isinstance(value, ItemError) for value in values):
        if column is not None:
            raise DistilError(f"{path.name}: no row has a label in '{column}'")
        return None
    numbers: dict[str, int] = {}
    found = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, ItemError):
            found.append(UNLABELLED)
            continue
        text = str(value).strip()
        if text not in numbers:
            numbers[text] = classes.find(text, f"{path.name}, row {number}")
        found.append(numbers[text])
    return found


def _first_item(path: Path) -> Any:
    return next(iter(open_rows(path, False))).item


def _first_key(path: Path) -> str | None:
    """The key of a .jsonl's first object that holds its image; None where rows are items as they are."""
    first = _first_item(path)
    keys = first if isinstance(first, dict) else {}
    return next((key for key in COLUMNS[False] if key in keys and len(keys) > 1), None)
