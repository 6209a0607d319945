"""Turns a folder, a table or MNIST's files into rows that a task reads, and the class of each where it is known.

folder/label/*.png, .txt  the folder's name is the label         folder/*.png, .txt   no labels
.csv .tsv .jsonl .parquet columns of paths or texts, and labels  MNIST's idx files    as training/mnist_data.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from optimise.errors import OptimiseError
from optimise.examples.idx import TRAIN, holds_idx, read_part
from vmap_ensemble.errors import ItemError
from vmap_ensemble.many import Row
from vmap_ensemble.offline.inputs import COLUMNS, InputError, Rows, open_rows

LABEL_COLUMN = "label"
# The class of a row that has none.
UNLABELLED = -1
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
            OptimiseError: No member knows it.
        """
        for number, name in self.names.items():
            if name == label:
                return number
        if label.isdecimal() and int(label) < self.count:
            return int(label)
        known = [self.names.get(number, str(number)) for number in range(min(self.count, SHOWN_LABELS))]
        more = f", ... ({self.count})" if self.count > SHOWN_LABELS else ""
        raise OptimiseError(f"{where}: label '{label[:80]}': no member knows it; they know {', '.join(known)}{more}")


@dataclass(frozen=True)
class Columns:
    """What of a table is read.

    Attributes:
        item: The column of paths or texts; None: by its name, see `open_rows`.
        label: The column of labels; None: `label`, where there is one.
        is_labelled: Whether labels are looked for, in folders' names too.
        reads_texts: Whether items are texts.
        keys: Names of the parts of an item that has several.
    """

    item: str | None = None
    label: str | None = None
    is_labelled: bool = True
    reads_texts: bool = False
    keys: Sequence[str] = ()


def open_data(path: Path, classes: Classes, columns: Columns, part: str = TRAIN) -> Data:
    """The rows of a folder or table, and their labels.

    Args:
        path: Where they are.
        classes: What labels may be.
        columns: What is read of a table.
        part: Which of MNIST's files: TRAIN or TEST.

    Raises:
        OptimiseError: A label is unknown to the members, or an idx file is damaged.
        InputError: There is no such file, no row, or no such column.
    """
    if not columns.reads_texts and holds_idx(path, part):
        return _open_idx(path, part, classes if columns.is_labelled else None)
    item = columns.item
    if item is None and path.suffix == ".jsonl":
        item = _first_key(path, columns.reads_texts)
    rows = open_rows(path, columns.reads_texts, columns.keys, item)
    if not columns.is_labelled:
        return Data(rows, None)
    if path.is_dir():
        return Data(rows, _labels_of_folders(path, rows, classes))
    return Data(rows, _labels_of_table(path, columns.label, classes) if path.suffix in TABLES else None)


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
            raise OptimiseError(f"{path.name}: no row has a label in '{column}'")
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


def _first_key(path: Path, reads_texts: bool) -> str | None:
    """The key of a .jsonl's first object that holds its image or text; None where rows are items as they are."""
    first = _first_item(path)
    keys = first if isinstance(first, dict) else {}
    return next((key for key in COLUMNS[reads_texts] if key in keys and len(keys) > 1), None)
