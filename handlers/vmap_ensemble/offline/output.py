"""Turns answers into lines of JSON that survive a kill: started again, a run goes on where the last was cut off.

answers.jsonl.part     the lines so far; it gets its name when the last one is written
answers.jsonl.state    what the lines were made with: an output of something else is never continued
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vmap_ensemble.errors import EnsembleError, ItemError
from vmap_ensemble.process.files import written_whole
from vmap_ensemble.serving.requests import error_body
from vmap_ensemble.serving.statuses import status_of
from vmap_ensemble.tasks.answers import Answer, dump_json


class OutputError(EnsembleError):
    """The output can't be written, or is of something else: one line that says why."""


def line_of(name: str, answer: Answer | ItemError) -> str:
    """One row of the output: the input's name, and the body that a server would send, or its error."""
    if isinstance(answer, ItemError):
        return dump_json({"input": name, **error_body(status_of(answer), str(answer))})
    return dump_json({"input": name, "answer": answer.body})


class Output:
    """The lines of one run, written window by window.

    Args:
        path: The file that there is at the end.
        made_with: What decides on the lines: archive, input, options, rows in a window.
        force: Replace an output that exists, and begin anew.

    Raises:
        OutputError: The file exists, or a part of it was made with something else.

    Attributes:
        state: `made_with` and what is decided on the way, such as the batch size.
        windows: How many are written already.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], force: bool = False) -> None:
        self.path = path
        self._part, self._state = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.state")
        if force:
            for old in (path, self._part, self._state):
                old.unlink(missing_ok=True)
        if path.exists():
            raise OutputError(f"{path.name}: exists; --force replaces it")
        self._check_folder()
        self.state: dict[str, Any] = self._read_state(made_with)
        self.windows = self._keep_whole_windows(int(made_with["window"]))

    def _check_folder(self) -> None:
        folder = self.path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"{self.path}: the folder isn't there, or can't be written to")

    def _read_state(self, made_with: Mapping[str, Any]) -> dict[str, Any]:
        if not self._state.is_file():
            self._part.unlink(missing_ok=True)
            return dict(made_with)
        known: dict[str, Any] = json.loads(self._state.read_text(encoding="utf-8"))
        for key, value in made_with.items():
            if known.get(key) != value:
                raise OutputError(
                    f"{self._part.name} was made with {key} {known.get(key)!r}, this is {value!r}; "
                    "--force begins anew, another --output leaves it"
                )
        return known

    def _keep_whole_windows(self, size: int) -> int:
        """Cut the lines of a window off that wasn't finished; the number of those that were."""
        if not self._part.is_file():
            return 0
        lines, end, whole_end = 0, 0, 0
        with self._part.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines, end = lines + 1, end + len(line)
                if lines % size == 0:
                    whole_end = end
        os.truncate(self._part, whole_end)
        return lines // size

    def write(self, windows: Iterator[Sequence[str]]) -> Iterator[int]:
        """Write the windows that are left; yields the number of lines of each, once they are on the disk.

        Args:
            windows: The lines of each, see `line_of`.
        """
        with self._part.open("a", encoding="utf-8") as file:
            for lines in windows:
                self._save_state()
                self._append(file, lines)
                yield len(lines)
        os.replace(self._part, self.path)
        self._state.unlink(missing_ok=True)

    def _append(self, file: IO[str], lines: Sequence[str]) -> None:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())

    def _save_state(self) -> None:
        """Before the first line: without it a part is of nobody knows what."""
        if not self._state.is_file():
            with written_whole(self._state) as scratch:
                scratch.write_text(json.dumps(self.state, indent=1), encoding="utf-8")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an output that is finished."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def to_parquet(lines: Path, target: Path) -> None:
    """The same rows as a table: input, status, the answer as JSON, and of classifications what people sort by.

    Args:
        lines: An output that is finished.
        target: The .parquet file.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns = {
        "input": arrow.string(),
        "status": arrow.int32(),
        "label": arrow.string(),
        "probability": arrow.float64(),
        "mutual_information": arrow.float64(),
        "answer": arrow.string(),
    }
    schema = arrow.schema(list(columns.items()))
    with written_whole(target) as scratch, parquet.ParquetWriter(scratch, schema) as writer:
        rows: list[dict[str, Any]] = []
        for line in read_lines(lines):
            rows.append(_table_row(line))
            if len(rows) == 1024:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema))


def _table_row(line: dict[str, Any]) -> dict[str, Any]:
    body = line.get("answer")
    if body is None:
        error = line["error"]
        return {"input": line["input"], "status": error["code"], "answer": error["message"]}
    top = body.get("prediction") or {}
    return {
        "input": line["input"],
        "status": 200,
        "label": top.get("label") if isinstance(top, dict) else None,
        "probability": top.get("probability") if isinstance(top, dict) else None,
        "mutual_information": (body.get("uncertainty") or {}).get("mutual_information"),
        "answer": dump_json(body),
    }
