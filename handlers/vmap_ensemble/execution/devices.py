"""Turns a forward and several devices into one run: members spread over them, or batches split among them.

    spread   each device has some of the members, and runs every batch     outputs joined along M
    split    each device has all members, and runs some rows of a batch    outputs joined along B

Whichever is measured fastest serves; one device alone is a candidate, too.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.core.members import StackedMembers, move_members
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.execution.chunking import batch_of, rows_of
from vmap_ensemble.execution.modes import Execution, prove
from vmap_ensemble.execution.register import ExecutionOptions
from vmap_ensemble.execution.timing import Args, Run, time_block

logger = logging.getLogger(__name__)

# Members on another device -> a forward of them like the given one, on an architecture of its own.
Join = Callable[[StackedMembers], Forward]


class OnDevices:
    """Runs on several devices at a time; their outputs come together on the first one.

    Args:
        runs: A device, and what runs on it, each. Tensors that aren't on the host are moved there.
        axis: 0 where each has members of its own and takes the whole batch; 1 where each takes some of its rows.
    """

    def __init__(self, runs: Sequence[tuple[torch.device, Run]], axis: int) -> None:
        self.runs, self.axis = list(runs), axis

    def __call__(self, *args: Any) -> Any:
        """Run a batch: arguments (B, ...) -> outputs (M, B, ...) on the first device."""
        parts = [args] * len(self.runs) if self.axis == 0 else self._split(args)
        # All are started before any output is waited for.
        found = [run(*move_args(part, device)) for (device, run), part in zip(self.runs, parts, strict=False)]
        home = self.runs[0][0]
        found = [pytree.tree_map(lambda leaf: leaf.to(home, non_blocking=True), outputs) for outputs in found]
        return pytree.tree_map(lambda *leaves: torch.cat(leaves, dim=self.axis), *found)

    def _split(self, args: Args) -> list[Args]:
        """About as many rows for each; none for the last ones where there are fewer rows than devices."""
        batch = batch_of(args)
        count = min(batch, len(self.runs))
        return [rows_of(args, batch, start, stop) for start, stop in pairwise(_bounds(batch, count))]


def move_args(args: Args, device: torch.device) -> Args:
    """Arguments on a device; those on the host stay, for the forward to look at."""

    def move(leaf: Any) -> Any:
        away = isinstance(leaf, Tensor) and leaf.device.type != "cpu"
        return leaf.to(device, non_blocking=True) if away else leaf

    return pytree.tree_map(move, args)


def build_on_devices(
    mode: str,
    forward: Forward,
    join: Join,
    devices: Sequence[torch.device],
    examples: Sequence[Args],
    options: ExecutionOptions,
) -> Execution:
    """Build a forward on one device, and on several by spreading and splitting; prove and return the fastest.

    Args:
        mode: As `build_execution` takes it; what serves on the first device serves on all.
        forward: Its members are on the first device.
        join: Makes a forward of members on another one.
        devices: At least two; the first one is where arguments come from and outputs go.
        examples: Argument tuples of the sizes that will be served.
        options: As `build_execution` takes them.

    Raises:
        LoadError: The forward isn't a vmapped one, or can't be built on the first device.
    """
    if not isinstance(forward, EnsembleForward) or forward.only_mode is not None:
        raise LoadError(f"devices: expected members of one vmapped forward, got {type(forward).__name__}")
    alone = build_execution(mode, forward, examples, options)
    ways = {"one device": lambda: alone.run, **_several(alone, forward, join, devices, examples, options)}
    runs: dict[str, Run] = {}
    rows = {name: Candidate(name) for name in ways}
    with torch.inference_mode():
        for name, make in ways.items():
            try:
                runs[name] = make()
                rows[name].latency_ms = [1e3 * time_block(runs[name], args, 0.0) for args in examples]
            except Exception as error:  # whatever another device may raise; one device serves then
                if name == "one device":
                    raise
                runs.pop(name, None)
                rows[name].refused = f"{type(error).__name__}: {first_line(error)}"
                logger.warning("%s can't be had: %s", name, rows[name].refused)
    return _prove_fastest(alone, forward, runs, rows, examples, options)


def _several(
    alone: Execution,
    forward: EnsembleForward,
    join: Join,
    devices: Sequence[torch.device],
    examples: Sequence[Args],
    options: ExecutionOptions,
) -> dict[str, Callable[[], Run]]:
    """Name of a way -> makes it."""
    count = len(forward.members.names)
    used = list(devices)[:count]

    def build(made: Forward, device: torch.device) -> tuple[torch.device, Run]:
        own = dataclasses.replace(
            options,
            cache_dir=None, packed=None, graph_folder=None, schedule=alone.schedule,
            sample=None if options.sample is None else move_args(options.sample, device),
        )  # fmt: skip
        return device, build_execution(alone.name, made, [move_args(args, device) for args in examples], own).run

    def split() -> Run:
        others = [build(join(move_members(forward.members, device)), device) for device in devices[1:]]
        return OnDevices([(devices[0], alone.run), *others], axis=1)

    def spread() -> Run:
        parts = [forward.part(start, stop) for start, stop in pairwise(_bounds(count, len(used)))]
        moved = [join(move_members(part.members, device)) for part, device in zip(parts, used, strict=True)]
        return OnDevices([build(made, device) for made, device in zip(moved, used, strict=True)], axis=0)

    where = ", ".join(map(str, devices))
    return {f"batches split among {where}": split, f"members spread over {where}": spread}


def _prove_fastest(
    alone: Execution,
    forward: Forward,
    runs: dict[str, Run],
    rows: dict[str, Candidate],
    examples: Sequence[Args],
    options: ExecutionOptions,
) -> Execution:
    fastest = min(runs, key=lambda name: statistics.geometric_mean(rows[name].latency_ms))
    execution = dataclasses.replace(
        alone,
        run=runs[fastest],
        reason=f"{alone.reason}; {fastest}, the fastest of {len(runs)} ways",
        candidates=[*alone.candidates, *rows.values()],
    )
    return prove(execution, forward, options.sample or examples[0], options.tolerance)


def _bounds(total: int, parts: int) -> list[int]:
    """Where about equal parts of so many begin, and the end."""
    return [total * part // parts for part in range(parts + 1)]
