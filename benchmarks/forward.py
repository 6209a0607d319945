"""Networks, members and batches -> the times of every way to run the ensemble on this machine, side by side.

    python -m benchmarks.forward --model resnet18 --members 4 --batch 1 8 --json forward.json

Every row has the largest difference to the plain loop, relative to the loop's largest output, and its distance to
the roofline: the least time that the arithmetic and the weights need at ceilings measured in the same run. A rival
that isn't installed, or fails, is a row with the reason.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.forward_rivals import RIVALS, Call, Rivals
from benchmarks.measure import Timing, describe_machine, describe_versions, measure_interleaved, write_json
from benchmarks.networks import NETWORKS, Network, build_members
from benchmarks.roofline import Ceilings, count_work, measure_ceilings

# Relative to the loop's largest output. Winograd convolutions of OpenVINO and oneDNN round more than torch does.
TOLERANCE = 1e-4


def compare_rivals(
    network: Network, count: int, batch: int, names: list[str], seconds: float, ceilings: Ceilings
) -> dict[str, Any]:
    """Build each rival, compare it with the loop, and time them in turns.

    Args:
        network: What the members are.
        count: M.
        batch: B.
        names: Which of `RIVALS`; the loop is always among them, and first.
        seconds: About how long measuring takes, without building.
        ceilings: Of this machine, for the roofline.

    Returns:
        A cell: network, members, batch, "work" with the roofline, and "rows", one per rival, those left out too.
    """
    networks = build_members(network, count)
    torch.manual_seed(count)
    args = network.make_args(batch)
    work = count_work(networks[0], args, count)
    left_out: dict[str, str] = {}
    calls: dict[str, Call] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(network, networks, args, Path(folder))
        want = rivals.loop()()
        for name in ["loop", *(name for name in names if name != "loop")]:
            try:
                call = getattr(rivals, name)()
                got = call()
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                continue
            differences[name] = float((got - want).abs().max() / want.abs().max())
            calls[name] = call
        timings = _measure(calls, args[0].device, seconds)
    rows = make_rows(timings, differences, work.bound_ms(ceilings), rivals.notes)
    rows += [{"rival": name, "left_out": reason} for name, reason in left_out.items()]
    return {"network": network.title, "members": count, "batch": batch, "work": work.to_json(ceilings), "rows": rows}


def _measure(calls: dict[str, Call], device: torch.device, seconds: float) -> list[Timing]:
    """Blocks of 4 calls in turns: warm caches as in a server, and short enough to meet the same noise."""
    block = 4
    trial = measure_interleaved(calls, device, warmup=2, iterations=2, block=2)
    round_s = block * sum(timing.mean_ms for timing in trial) / 1e3
    rounds = min(100, max(3, math.ceil(seconds / round_s)))
    return measure_interleaved(calls, device, warmup=block, iterations=rounds * block, block=block)


def make_rows(
    timings: list[Timing], differences: dict[str, float], bound_ms: float, notes: dict[str, str]
) -> list[dict[str, Any]]:
    """One row per timing: ratio to the first, distance to the roofline, difference to the loop."""
    rows = []
    for timing in timings:
        figures = asdict(timing)
        name = figures.pop("name")
        difference = differences[name]
        row = {
            "rival": name, **figures, "ratio": timings[0].median_ms / timing.median_ms,
            "times_roofline": timing.median_ms / bound_ms, "largest_relative_difference": difference,
            "equal": difference <= TOLERANCE,  # False for nan
        }  # fmt: skip
        rows.append({**row, "note": notes[name]} if name in notes else row)
    return rows


def print_cell(cell: dict[str, Any]) -> None:
    """Print one network, count and batch."""
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forward", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=sorted(NETWORKS), default=["resnet18"], help="networks, with random weights")
    add("--members", type=int, nargs="+", default=[4], help="sizes of the ensemble, such as 2 4 8 16 32")
    add("--batch", type=int, nargs="+", default=[1], help="batch sizes, such as 1 8 32")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the other runtimes")
    add("--seconds", type=float, default=30.0, help="about how long to measure each cell")
    add("--only", nargs="+", choices=RIVALS, default=list(RIVALS), help="rivals beside the loop")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; 1 where a rival's numbers differ from the loop's."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    machine = {
        **describe_machine(device),
        **describe_versions("torchvision", "onnxruntime", "openvino", "transformers"),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    ceilings = measure_ceilings(device)
    print(f"ceilings: {ceilings.bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e9:.0f} GFLOP/s in float32")
    cells = []
    for name in options.model:
        for count in options.members:
            for batch in options.batch:
                torch.compiler.reset()
                with torch.inference_mode():
                    cells.append(
                        compare_rivals(NETWORKS[name], count, batch, options.only, options.seconds, ceilings)
                    )
                print_cell(cells[-1])
    if options.json:
        write_json(options.json, machine, [], table="forward", cells=cells)
    return report_differences(cells)


def report_differences(cells: list[dict[str, Any]]) -> int:
    """Print every rival whose numbers are not the loop's; the exit code."""
    different = [(cell, row) for cell in cells for row in cell["rows"] if not row.get("equal", True)]
    for cell, row in different:
        where = f"{cell['network']}, {cell['members']} members, batch {cell['batch']}"
        print(f"error: {where}: {row['rival']} differs by {row['largest_relative_difference']:.1e}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
