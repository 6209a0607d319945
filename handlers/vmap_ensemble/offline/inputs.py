"""Turns a folder, a table or tar shards into rows: a name and an item that the archive's task reads.

Nothing is read before its turn: a folder gives paths, a table its rows, a shard the bytes of one file at a time.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmap_ensemble.errors import EnsembleError, UnreadableItem, first_line
from vmap_ensemble.many import Row, read_file
from vmap_ensemble.offline.tables import import_parquet
from vmap_ensemble.process.order import natural

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEXTS = (".txt", ".json")
# Columns that are taken where none is named, in this order.
COLUMNS = {True: ("text", "sentence", "review"), False: ("image", "path", "file", "filename")}
# A field of a table may hold a long document; csv's own limit is 131072.
LONGEST_FIELD = 1 << 26


class InputError(EnsembleError):
    """The input can't be read as a whole: one line that says why."""


@dataclass(frozen=True)
class Rows:
    """Rows that can be iterated over any number of times.

    Attributes:
        read: Starts reading at the first row.
        count: How many there are; None where that is only known at the end.
    """

    read: Callable[[], Iterator[Row]]
    count: int | None

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def open_rows(path: Path, reads_texts: bool, keys: Sequence[str] = (), column: str | None = None) -> Rows:
    """The rows of a folder, a .csv, .tsv, .jsonl or .parquet table, or a .tar shard.

    Args:
        path: Where they are; a folder may hold shards, files of its kind, and folders of those.
        reads_texts: Whether items are texts; otherwise images, and a column of a table holds their paths.
        keys: Names of the parts of an item that has several, such as `question` and `context`.
        column: The column of a table that holds the items.

    Raises:
        InputError: There is no such file, no row, or no such column.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path, TEXTS if reads_texts else IMAGES)
    if path.suffix in READERS:
        return READERS[path.suffix](path, _Columns(path, reads_texts, tuple(keys), column))
    if path.suffix in (IMAGES + TEXTS):
        return Rows(lambda: iter([Row(path.name, path)]), 1)
    raise InputError(f"{path.name}: expected a folder or a file that ends in {', '.join(READERS)}")


def _folder(path: Path, suffixes: tuple[str, ...]) -> Rows:
    files = sorted((file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)), key=natural)
    shards = [file for file in files if file.suffix == ".tar"]
    own = [file for file in files if file.suffix.lower() in suffixes]
    if shards and own:
        raise InputError(f"{path.name}: holds shards ({shards[0].name}) and files ({own[0].name}); name one kind")
    if not shards and not own:
        raise InputError(f"{path.name}: holds no file that ends in {', '.join(suffixes)} or .tar")
    if shards:
        return Rows(lambda: (row for shard in shards for row in _read_shard(shard)), None)
    return Rows(lambda: (Row(file.relative_to(path).as_posix(), file) for file in own), len(own))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


# --- tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table make an item."""

    path: Path
    reads_texts: bool
    keys: tuple[str, ...]
    column: str | None

    def choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """One column, or those that together are an item.

        Raises:
            InputError: None fits; it lists those that there are.
        """
        if self.column is not None:
            if self.column not in names:
                raise InputError(f"{self.path.name}: no column '{self.column}'; there are {', '.join(names)}")
            return (self.column,)
        parts = tuple(name for name in self.keys if name in names)
        if len(parts) > 1:
            return parts
        found = [name for name in (*COLUMNS[self.reads_texts], *parts) if name in names]
        if not found and len(names) == 1:
            found = list(names)
        if not found:
            raise InputError(f"{self.path.name}: --column: name the one to be answered: {', '.join(names)}")
        return (found[0],)

    def item(self, values: dict[str, Any], chosen: tuple[str, ...]) -> Any:
        """What the task reads of a row."""
        if len(chosen) > 1:
            return {name: values[name] for name in chosen}
        value = values[chosen[0]]
        if value is None or value == "":
            return UnreadableItem(f"column '{chosen[0]}' is empty")
        if isinstance(value, dict) and value.get("bytes") is not None:  # what Hugging Face's data sets call an image
            return value["bytes"]
        return value if self.reads_texts or not isinstance(value, str) else self.path.parent / value


def _read_csv(path: Path, columns: _Columns) -> Rows:
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = "\t" if path.suffix == ".tsv" else ","

    def read() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            chosen = columns.choose(list(reader.fieldnames or ()))
            for number, values in enumerate(reader, start=1):
                yield Row(str(number), columns.item(values, chosen))

    return _checked(path, read)


def _read_jsonl(path: Path, columns: _Columns) -> Rows:
    def read() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(str(number), item(line))

    def item(line: str) -> Any:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            return UnreadableItem(f"expected JSON ({first_line(error)})")
        if isinstance(value, dict) and columns.column is not None:
            if columns.column not in value:
                return UnreadableItem(f"no key '{columns.column}'")
            return columns.item(value, (columns.column,))
        return value

    return _checked(path, read)


def _read_parquet(path: Path, columns: _Columns) -> Rows:
    parquet = import_parquet(path.name)
    try:
        with parquet.ParquetFile(path) as file:
            chosen, count = columns.choose(file.schema_arrow.names), file.metadata.num_rows
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: can't be read as Parquet ({first_line(error)})") from None

    def read() -> Iterator[Row]:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(chosen)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(str(number), columns.item(values, chosen))

    return Rows(read, count) if count else _empty(path)


def _checked(path: Path, read: Callable[[], Iterator[Row]]) -> Rows:
    """The rows of a text file, counted: whatever is wrong with it as a whole is found before any work."""
    try:
        count = sum(1 for _ in read())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: can't be read as UTF-8 {path.suffix} ({first_line(error)})") from None
    return Rows(read, count) if count else _empty(path)


def _empty(path: Path) -> Rows:
    raise InputError(f"{path.name}: holds no row")


# --- shards --------------------------------------------------------------------------------------------------


def _read_shard(path: Path) -> Iterator[Row]:
    with tarfile.open(path) as shard:
        for entry in shard:
            suffix = Path(entry.name).suffix.lower()
            if entry.isfile() and suffix in IMAGES + TEXTS:
                file = shard.extractfile(entry)
                data = file.read() if file else b""
                yield Row(f"{path.name}/{entry.name}", _read_entry(entry.name, data))


def _read_entry(name: str, data: bytes) -> Any:
    try:
        return read_file(Path(name), data)
    except UnreadableItem as error:
        return error


def _read_tar(path: Path, _columns: _Columns) -> Rows:
    try:
        tarfile.open(path).close()
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path.name}: can't be read as tar ({first_line(error)})") from None
    return Rows(lambda: _read_shard(path), None)


READERS: dict[str, Callable[[Path, _Columns], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
}
