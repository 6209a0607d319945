"""Turns any number of items into answers, in order, in batches that hold little padding and in constant memory.

items -> windows (read and parsed, in processes if asked) -> sorted by size -> batches -> answers in the items' order

A window is the unit of everything: which examples share a batch depends on the window alone, so that a run which is
cut off and goes on at a window's start gives what an undisturbed one gives.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vmap_ensemble.errors import ItemError, NoAnswer, OutOfMemory, UnreadableItem, first_line, where
from vmap_ensemble.tasks.answers import Answer, Options
from vmap_ensemble.tasks.task import Task

logger = logging.getLogger(__name__)

# Items that are parsed together: texts, among which those of like length are found, and images, which are large.
WINDOW = {True: 256, False: 64}
# Batch sizes that are measured, and the time that it may take.
BATCH_SIZES, MEASURE_S = (8, 16, 32, 64), 5.0


class Answering(Protocol):
    """What is asked: an ensemble, which stands above this module."""

    task: Task

    def answer(self, examples: Sequence[Any], options: Sequence[Options]) -> list[Answer | ItemError]:
        """One forward for parsed examples, and one answer each."""


@dataclass(frozen=True)
class Row:
    """One thing to be answered: its name, and what the task reads, or the error that says why it can't be read."""

    name: str
    item: Any


class Window(NamedTuple):
    """Rows that were parsed together: their names, and an example each or the ItemError in its place."""

    names: list[str]
    examples: Any


@dataclass(frozen=True)
class Numbered:
    """Items as rows that are called by their number, from 0; as often as the items can be iterated over."""

    items: Iterable[Any]

    def __iter__(self) -> Iterator[Row]:
        return (Row(str(number), item) for number, item in enumerate(self.items))


class Windows(IterableDataset[Window]):
    """Rows by the window, parsed.

    Args:
        task: Parses items.
        rows: What is answered. Each worker iterates over all of them, and opens and parses those of its windows.
        skip: Windows that are left out at the start.

    Attributes:
        size: Rows in a window.
    """

    def __init__(self, task: Task, rows: Iterable[Row], skip: int = 0) -> None:
        self.task, self.rows, self.size, self.skip = task, rows, WINDOW[task.reads_texts], skip

    def __iter__(self) -> Iterator[Window]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows, number = iter(self.rows), -1
        while window := list(islice(rows, self.size)):
            number += 1
            # DataLoader asks its workers in turn, so the windows come back in order.
            if number >= self.skip and (number - self.skip) % workers == turn:
                parsed = self.parse(window, parallel=worker is None)
                yield parsed if worker is None else Window(parsed.names, _joined(parsed.examples))

    def parse(self, window: Sequence[Row], parallel: bool = True) -> Window:
        """The rows of one window, opened and parsed.

        Args:
            window: `size` rows, or fewer at the end.
            parallel: Whether the task may use its threads.
        """
        return Window([row.name for row in window], self._parse([row.item for row in window], parallel))

    def _parse(self, items: list[Any], parallel: bool) -> list[Any]:
        opened = [_attempt(open_item, item) for item in items]
        good = [item for item in opened if not isinstance(item, Exception)]
        # A forked process has none of the threads that the task may have made.
        parsed = iter(self.task.parse_items(good) if parallel else [_attempt(self.task.parse, item) for item in good])
        examples = [item if isinstance(item, Exception) else next(parsed) for item in opened]
        return [_as_item_error(example) for example in examples]


def load_windows(windows: Windows, workers: int = 0) -> Iterator[Window]:
    """The windows, parsed by this process or by others ahead of time.

    Args:
        windows: What is read.
        workers: Processes that read, decode and tokenise; 0 for none beside this one.
    """
    ahead: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": _start_worker} if workers else {}
    loader: Iterable[Window] = DataLoader(windows, batch_size=None, num_workers=workers, **ahead)
    for names, examples in loader:
        yield Window(names, _parted(examples) if workers else examples)


def answer_window(ensemble: Answering, examples: Sequence[Any], options: Options, batch: int) -> list[Any]:
    """An Answer or ItemError for each example of a window, in order; batches hold examples of like size.

    Args:
        ensemble: What is asked.
        examples: As `Windows` gives them.
        options: Of all of them.
        batch: Examples in a forward, at most.
    """
    answers = list(examples)
    good = [index for index, example in enumerate(examples) if not isinstance(example, ItemError)]
    good.sort(key=lambda index: ensemble.task.size_of(examples[index]))
    for start in range(0, len(good), batch):
        own = good[start : start + batch]
        found = answer_each(ensemble, [examples[index] for index in own], [options] * len(own))
        for index, answer in zip(own, found, strict=True):
            answers[index] = answer
    return answers


def answer_each(
    ensemble: Answering,
    examples: list[Any],
    options: list[Options],
    failed: Callable[[], None] = lambda: None,
) -> list[Answer | ItemError]:
    """One forward for all examples; should it fail, one for each, so that neighbours are answered.

    Args:
        ensemble: What is asked.
        examples: What its task parsed.
        options: One per example.
        failed: Called when a batch failed as a whole.
    """
    failure: ItemError
    try:
        return ensemble.answer(examples, options)
    except ItemError as error:
        failure = error
    except torch.OutOfMemoryError:
        failure = OutOfMemory("not enough memory for this input")
    except Exception as error:
        logger.error("the forward of a batch of %d failed: %s", len(examples), where(error))
        failure = NoAnswer("the model failed on this input")
    if len(examples) == 1:
        return [failure]
    failed()
    logger.warning("a batch of %d failed as a whole; answering its examples one by one", len(examples))
    return [answer_each(ensemble, [e], [o])[0] for e, o in zip(examples, options, strict=True)]


def find_batch(ensemble: Answering, examples: Sequence[Any], options: Options, budget_s: float = MEASURE_S) -> int:
    """The size of batches that answers most examples in a second, measured on real ones.

    Args:
        ensemble: What is asked.
        examples: Of the first window.
        options: As they will be asked.
        budget_s: Time that it may take, about: larger batches are tried while it lasts.
    """
    good = [example for example in examples if not isinstance(example, ItemError)]
    best, least_s, started = BATCH_SIZES[0], float("inf"), time.perf_counter()
    for size in BATCH_SIZES:
        if len(good) < size or time.perf_counter() - started > budget_s:
            break
        part = good[:size]
        seconds = []
        for _ in range(3):  # the first call makes what later ones find
            begun = time.perf_counter()
            answer_window(ensemble, part, options, size)
            seconds.append((time.perf_counter() - begun) / size)
        if min(seconds) < least_s:
            best, least_s = size, min(seconds)
    return best


def open_item(item: Any) -> Any:
    """A path as the bytes of its file, or what its JSON says; anything else as it is.

    Raises:
        UnreadableItem: The file can't be read.
    """
    if not isinstance(item, Path):
        return item
    try:
        return read_file(item, item.read_bytes())
    except OSError as error:
        raise UnreadableItem(f"{item.name}: {error.strerror}") from None


def read_file(path: Path, data: bytes) -> Any:
    """The bytes of a file as the item that they are: JSON as what it says, any other as it is.

    Raises:
        UnreadableItem: It is called JSON and isn't.
    """
    try:
        return json.loads(data) if path.suffix.lower() == ".json" else data
    except (ValueError, RecursionError) as error:
        raise UnreadableItem(f"{path.name}: {first_line(error)}") from None


def _attempt(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except Exception as error:
        return error


def _as_item_error(example: Any) -> Any:
    """Whatever a task raised as an ItemError; examples as they are."""
    if not isinstance(example, Exception) or isinstance(example, ItemError):
        return example
    logger.error("an item could not be read: %s", where(example))
    return UnreadableItem("this item could not be read")


def _start_worker(_number: int) -> None:
    # One core for each; the tokenizers' own threads don't survive a fork.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _joined(examples: list[Any]) -> tuple[dict[int, ItemError], Any]:
    """Examples for another process: tensors of one shape as a single one, since each would need a file of its own."""
    errors = {index: example for index, example in enumerate(examples) if isinstance(example, ItemError)}
    good = [example for example in examples if not isinstance(example, ItemError)]
    kinds = {(example.shape, example.dtype) if isinstance(example, Tensor) else None for example in good}
    return errors, torch.stack(good) if len(kinds) == 1 and None not in kinds else good


def _parted(joined: tuple[dict[int, ItemError], Any]) -> list[Any]:
    errors, good = joined
    rest = iter(good)
    return [errors[index] if index in errors else next(rest) for index in range(len(errors) + len(good))]
