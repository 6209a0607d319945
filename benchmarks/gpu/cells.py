"""Settings -> the times of every way to run them on a GPU, side by side, and whether ours is as fast as is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.settings import Setting
from benchmarks.measuring.networks import NETWORKS, Network, encoder_network, image_network
from benchmarks.measuring.roofline import Ceilings, add_roofline, measure_ceilings
from benchmarks.runs.forward import Cell, compare_rivals, print_cell
from vmap_ensemble.execution.timing import Budget
from vmap_ensemble.process.device import DTYPES

RAGGED = (80, *[8] * 7)
AUTO_S = 2.0  # of mode `auto` for a setting: its compiled candidate is a rival of its own


def networks() -> dict[str, Network]:
    """The networks of the settings, by name."""
    return {
        **NETWORKS,
        "resnet18-720": image_network("resnet18", 720),
        "bert-10": encoder_network("bert-base shape", layers=12, hidden=768, tokens=10),
        "bert-ragged": encoder_network("bert-base shape", layers=12, hidden=768, lengths=RAGGED),
        "minilm-ragged": encoder_network("MiniLM-L6 shape", layers=6, hidden=384, lengths=RAGGED),
    }


def measure(
    settings: Sequence[Setting], device: torch.device, budget: Budget, seconds: float
) -> list[dict[str, Any]]:
    """Compare the rivals of each setting for which time is left, and print them.

    Args:
        settings: What is measured.
        device: On which GPU.
        budget: What is left at its end has no rows, and says so.
        seconds: About how long measuring a setting takes, without building it.

    Returns:
        Cells as `benchmarks.forward` writes them, each with the "wanted" ratios and whether they are "reached".
    """
    found, known = [], networks()
    ceilings: dict[str, Ceilings] = {}
    for setting in settings:
        cell = Cell(known[setting.network], setting.members, setting.batch, device, DTYPES[setting.dtype])
        if budget.left_s <= 0:
            late = f"not measured: {budget.seconds:.0f} s were spent before its turn"
            found.append({**cell.to_json(), "left_out": late, "rows": []})
        else:
            if setting.dtype not in ceilings:
                ceilings[setting.dtype] = measure_ceilings(device, cell.dtype)
            torch.compiler.reset()
            with torch.inference_mode():
                compared = compare_rivals(cell, setting.rivals, seconds, AUTO_S)
            add_roofline(compared, ceilings[setting.dtype])
            found.append({**compared, **judge(setting, compared["rows"])})
        print_cell(found[-1])
        print_verdict(found[-1])
    return found


def judge(setting: Setting, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is wanted of the fastest of ours, what it reached, and whether that is enough; nothing without ours."""
    times = {row["rival"]: row["median_ms"] for row in rows if "median_ms" in row and row["equal"]}
    ours = {name: ms for name, ms in times.items() if name.startswith("ours")}
    if not ours:
        return {}
    name = min(ours, key=lambda key: ours[key])
    wanted = {"loop_graph": setting.over_graph, "loop_reduce_overhead": setting.over_compile}
    got = {rival: times[rival] / ours[name] for rival, least in wanted.items() if least and rival in times}
    reached = all(got[rival] >= (wanted[rival] or 0) for rival in got)
    in_time = setting.most_ms is None or ours[name] <= setting.most_ms
    return {
        "fastest": name, "wanted": {**wanted, "most_ms": setting.most_ms}, "times_the_speed_of": got,
        "reached": reached and in_time,
    }  # fmt: skip


def print_verdict(cell: dict[str, Any]) -> None:
    """One line below a cell: the fastest of ours beside its rivals, and what is wanted."""
    if "fastest" not in cell:
        return
    parts = [f"{ratio:.2f}x {rival} (wanted {cell['wanted'][rival]:g}x)" for rival, ratio in
             cell["times_the_speed_of"].items()]  # fmt: skip
    if cell["wanted"]["most_ms"] is not None:
        parts.append(f"wanted within {cell['wanted']['most_ms']:g} ms")
    print(f"{'reached' if cell['reached'] else 'NOT REACHED'}: {cell['fastest']} {', '.join(parts)}")
