"""The settings of the published figures -> their ratios on this machine."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.measuring.measure import describe_machine, describe_versions, use_threads, write_json
from benchmarks.measuring.networks import NETWORKS, Network, encoder_network, image_network
from benchmarks.runs.forward import Cell, measure_cells, report_differences

MEMBERS, BATCH = 2, 1
RIVALS = ["loop", "stock_vmap", "ours_auto"]
PUBLISHED_ON = "a GPU of 2022, the loop with its host's part"
# Name -> network, and the published ratio of loop to vmap.
SETTINGS: dict[str, tuple[Network, float]] = {
    "mnist": (NETWORKS["mnist"], 17.0),
    "resnet18": (image_network("resnet18", side=720), 15.7),
    "bert": (encoder_network("bert-base shape", layers=12, hidden=768, tokens=10), 1.79),
}


def measure_settings(names: list[str], seconds: float) -> list[dict[str, Any]]:
    """Cells of `forward`, each with the published ratio."""
    cells = measure_cells([Cell(SETTINGS[name][0], MEMBERS, BATCH) for name in names], RIVALS, seconds)
    return [
        {**cell, "setting": name, "published_ratio": SETTINGS[name][1], "published_on": PUBLISHED_ON}
        for name, cell in zip(names, cells, strict=True)
    ]


def print_table(cells: list[dict[str, Any]]) -> None:
    """Print the ratios of loop to vmap, here and published."""
    print(f"\nloop / vmap, {MEMBERS} members, batch {BATCH}; published: on {PUBLISHED_ON}: not the same hardware")
    print(f"{'':34}{'stock vmap':>12}{'ours':>10}{'published':>12}")
    for cell in cells:
        ratios = {row["rival"]: row.get("ratio") for row in cell["rows"]}
        cells_ = "".join(
            f"{ratios[name]:{width}.2f}x" if ratios.get(name) else f"{'-':>{width + 1}}"
            for name, width in (("stock_vmap", 11), ("ours_auto", 9))
        )
        print(f"{cell['network']:34}{cells_}{cell['published_ratio']:11.2f}x")


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where numbers differ from the loop's."""
    use_threads(options.threads)
    machine = {**describe_machine(torch.device("cpu")), **describe_versions("torchvision", "transformers")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    cells = measure_settings(options.settings, options.seconds)
    print_table(cells)
    if options.json:
        write_json(options.json, machine, [], table="seeds", cells=cells)
    return report_differences(cells)
