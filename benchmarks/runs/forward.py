"""Cells of network, members and batch -> rows of each rival's time, difference and distance to the roofline."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.measuring.measure import (
    Timing,
    describe_machine,
    describe_versions,
    measure_interleaved,
    use_threads,
    write_json,
)
from benchmarks.measuring.networks import NETWORKS, Args, Network, build_members, parameter_bytes
from benchmarks.measuring.rivals import Call, Rivals
from benchmarks.measuring.roofline import add_roofline, count_work, measure_ceilings
from vmap_ensemble.core.proof import TOLERANCE
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.device import DTYPES
from vmap_ensemble.process.memory import keep_freed_memory

# Of all members' weights: modules, stack, and what compilers and preparations keep.
COPIES = 4


@dataclass(frozen=True)
class Cell:
    """What is run: a network, M members, B examples, where and in which floating point type."""

    network: Network
    members: int
    batch: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def build(self) -> tuple[list[nn.Module], Args]:
        """The members and one batch, in place.

        Raises:
            EnsembleError: the memory at hand is too little; on a CPU, where the system would end the process.
        """
        needed = COPIES * self.members * parameter_bytes(self.network.build())
        available = psutil.virtual_memory().available
        if self.device.type == "cpu" and needed > available:
            raise EnsembleError(f"needs about {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} are free")
        networks = [network.to(self.device, self.dtype) for network in build_members(self.network, self.members)]
        torch.manual_seed(self.members)
        return networks, tuple(self._place(arg) for arg in self.network.make_args(self.batch))

    def _place(self, arg: Tensor) -> Tensor:
        return arg.to(self.device, self.dtype if arg.is_floating_point() else None)

    def to_json(self) -> dict[str, Any]:
        """The cell's description."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            "network": self.network.title, "members": self.members, "batch": self.batch,
            "device": self.device.type, "dtype": names[self.dtype],
        }  # fmt: skip


def compare_rivals(cell: Cell, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Build each rival, compare it with the loop, and time them in turns.

    Args:
        cell: What is run.
        names: Which of `RIVALS`; the loop is always among them, and first.
        seconds: About how long measuring takes, without building.

    Returns:
        The cell's description, "work", and "rows", one per rival, those left out too; or the description and
        "left_out", why nothing was run.
    """
    try:
        networks, args = cell.build()
    except (EnsembleError, torch.OutOfMemoryError) as error:
        return {**cell.to_json(), "left_out": str(error).splitlines()[0], "rows": []}
    work = count_work(networks[0], args, cell.members)
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(cell.network, networks, args, Path(folder))
        calls, differences, left_out = build_calls(rivals, names)
        timings = _measure(calls, cell.device, seconds)
    rows = make_rows(timings, differences, TOLERANCE[cell.dtype], rivals.notes)
    rows += [{"rival": name, "left_out": reason} for name, reason in left_out.items()]
    return {**cell.to_json(), "work": asdict(work), "rows": rows}


def build_calls(rivals: Rivals, names: Sequence[str]) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Build the loop and the named rivals, and run each once.

    Returns:
        Name -> call; name -> largest difference to the loop relative to its largest output; name -> why it is
        left out.
    """
    calls: dict[str, Call] = {"loop": rivals.loop()}
    want = calls["loop"]()
    differences, left_out = {"loop": 0.0}, {}
    for name in names:
        if name == "loop":
            continue
        try:
            call = getattr(rivals, name)()
            got = call()
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        differences[name] = float((got - want).abs().max() / want.abs().max())
        calls[name] = call
    return calls, differences, left_out


def _measure(calls: dict[str, Call], device: torch.device, seconds: float) -> list[Timing]:
    """Blocks of 4 calls in turns: warm caches as in a server, and short enough to meet the same noise."""
    block = 4
    trial = measure_interleaved(calls, device, warmup=2, iterations=2, block=2)
    round_s = block * sum(timing.mean_ms for timing in trial) / 1e3
    rounds = min(100, max(3, math.ceil(seconds / round_s)))
    return measure_interleaved(calls, device, warmup=block, iterations=rounds * block, block=block)


def make_rows(
    timings: list[Timing], differences: dict[str, float], tolerance: float, notes: dict[str, str]
) -> list[dict[str, Any]]:
    """One row per timing: ratio to the first, difference to the loop."""
    rows = []
    for timing in timings:
        figures = asdict(timing)
        name = figures.pop("name")
        difference = differences[name]
        row = {
            "rival": name, **figures, "ratio": timings[0].median_ms / timing.median_ms,
            "largest_relative_difference": difference,
            "equal": difference <= tolerance,  # False for nan
        }  # fmt: skip
        rows.append({**row, "note": notes[name]} if name in notes else row)
    return rows


def print_cell(cell: dict[str, Any]) -> None:
    """Print one network, count and batch."""
    if "left_out" in cell:
        print(f"\n{cell['network']}, {cell['members']} members, batch {cell['batch']}: {cell['left_out']}")
        return
    work = cell["work"]
    print(
        f"\n{cell['network']}, {cell['members']} members, batch {cell['batch']}: {work['flops'] / 1e9:.2f} GFLOP, "
        f"{work['bytes'] / 2**20:.0f} MiB, at least {work['bound_ms']:.2f} ms ({work['limited_by']})"
    )
    print(f"{'':23}{'median':>12}{'p10':>12}{'p90':>12}{'loop = 1':>10}{'roofline = 1':>14}  difference")
    for row in cell["rows"]:
        if "left_out" in row:
            print(f"{row['rival']:23}  left out: {row['left_out'][:90]}")
            continue
        times = "".join(f"{row[key]:9.3f} ms" for key in ("median_ms", "p10_ms", "p90_ms"))
        print(
            f"{row['rival']:23}{times}{row['ratio']:9.2f}x{row['times_roofline']:13.2f}x  "
            f"{row['largest_relative_difference']:.1e}{'' if row['equal'] else '  DIFFERS'}  {row.get('note', '')}"
        )


def run(options: argparse.Namespace) -> int:
    """Compare and print; 1 where a rival's numbers differ from the loop's."""
    use_threads(options.threads)
    keep_freed_memory()  # as a worker does
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    machine = {
        **describe_machine(device),
        **describe_versions("torchvision", "onnxruntime", "openvino", "transformers"),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    made = [
        Cell(NETWORKS[name], count, batch, device, dtype)
        for name, count, batch in itertools.product(options.model, options.members, options.batch)
    ]
    cells = measure_cells(made, options.only, options.seconds)
    if options.json:
        write_json(options.json, machine, [], table="forward", cells=cells)
    return report_differences(cells)


def measure_cells(made: Sequence[Cell], names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Compare, print and return every cell; the ceilings are the best of what was measured before and between."""
    place = made[0].device, made[0].dtype
    ceilings = measure_ceilings(*place)
    cells = []
    for cell in made:
        torch.compiler.reset()
        with torch.inference_mode():
            cells.append(compare_rivals(cell, names, seconds))
        ceilings = ceilings.best(measure_ceilings(*place))
        add_roofline(cells[-1], ceilings)
        print_cell(cells[-1])
    for found in cells:
        add_roofline(found, ceilings)
    print(f"\nceilings: {ceilings.bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e9:.0f} GFLOP/s")
    return cells


def report_differences(cells: list[dict[str, Any]]) -> int:
    """Print every rival whose numbers are not the loop's; the exit code."""
    different = [(cell, row) for cell in cells for row in cell["rows"] if not row.get("equal", True)]
    for cell, row in different:
        where = f"{cell['network']}, {cell['members']} members, batch {cell['batch']}"
        print(f"error: {where}: {row['rival']} differs by {row['largest_relative_difference']:.1e}", file=sys.stderr)
    return 1 if different else 0
