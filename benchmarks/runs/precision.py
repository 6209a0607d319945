"""Members in each precision -> tables of accuracy and of times."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measuring.measure import Timing, describe_machine, measure_interleaved
from benchmarks.measuring.networks import NETWORKS, build_members, device_of, states_of
from quality.scores import combine, score
from training.runs.evaluate import find_members
from training.runs.mnist import open_data
from training.runs.mnist_data import DataError, Digits, normalise
from vmap_ensemble.archive.checkpoints import read_state_dict
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers, stack_members
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.execution.cpu.networks import prepare
from vmap_ensemble.execution.int8.calibration import calibrate
from vmap_ensemble.execution.int8.forward import QuantisedForward
from vmap_ensemble.models.mnist import MnistNet

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALIBRATION_IMAGES, TEST_BATCH = 256, 200
BLOCK = 4  # calls of one rival in a row
HOPELESS = 5  # times the float32 loop

Forward = Callable[[Tensor], Any]


def load_networks(files: list[Path]) -> list[nn.Module]:
    """MNIST networks with the weights of checkpoint files."""
    networks: list[nn.Module] = []
    for file in files:
        network = MnistNet()
        network.load_state_dict(read_state_dict(file))
        networks.append(network.eval())
    return networks


def cast_members(members: StackedMembers, dtype: torch.dtype) -> StackedMembers:
    """The members in another floating point type."""
    stacked = {k: t.to(dtype) if t.is_floating_point() else t for k, t in members.stacked.items()}
    return StackedMembers(members.names, stacked, {})


class Rivals:
    """The same members in each precision, run in each way that it has; `build` gives (B, ...) -> (M, B, C)."""

    names = ("fp32 loop", "fp32 prepared", "bf16 loop", "bf16 prepared", "fp16 loop", "fp16 prepared", "int8")

    def __init__(self, model: str, networks: list[nn.Module], samples: list[Tensor]) -> None:
        self.model, self.networks, self.samples = model, networks, samples
        self.members = stack_members(states_of(networks), device=device_of(networks[0]), share=False)
        self.ranges: Any = None

    def build(self, name: str, example: Tensor) -> Forward:
        """Make a rival for batches like the example.

        Raises:
            UnsupportedModel: It can't be had on this machine; the text says why.
        """
        precision, _, way = name.partition(" ")
        network = NETWORKS[self.model].build()
        if precision == "int8":
            self.ranges = self.ranges or calibrate(network, self.members, [(batch,) for batch in self.samples])
            return QuantisedForward(network, self.members, self.ranges, (example,))
        dtype = HALVES.get(precision, torch.float32)
        members = cast_members(self.members, dtype)
        run: Forward = EnsembleForward(network, members).loop
        if way == "prepared":
            run = prepare(network, members, example.to(dtype))
        return lambda x: run(x.to(dtype)).float()


def compare_times(rivals: Rivals, example: Tensor, seconds: float) -> tuple[list[Timing], dict[str, float]]:
    """Time each rival in turns on one batch; also the largest difference to the loop, relative to its output."""
    runs: dict[str, Callable[[], Tensor]] = {}
    differences: dict[str, float] = {}
    want = rivals.build("fp32 loop", example)(example)
    for name in rivals.names:
        try:
            run = rivals.build(name, example)
        except EnsembleError as error:
            print(f"{name} is left out: {error}")
            continue
        differences[name] = float((run(example) - want).abs().max() / want.abs().max())
        runs[name] = lambda run=run: run(example)  # type: ignore[misc]
    trial = measure_interleaved(runs, example.device, warmup=1, iterations=2, block=2)
    loop_ms = trial[0].median_ms
    for timing in [timing for timing in trial if timing.median_ms > HOPELESS * loop_ms]:
        print(
            f"{timing.name} takes {timing.median_ms:.0f} ms, {timing.median_ms / loop_ms:.0f} times the loop; "
            "it is measured no further"
        )
        del runs[timing.name]
        trial.remove(timing)
    rounds = max(3, min(100, round(1e3 * seconds / (BLOCK * sum(timing.mean_ms for timing in trial)))))
    return measure_interleaved(runs, example.device, BLOCK, rounds * BLOCK, BLOCK), differences


def judge(rivals: Rivals, test: Digits) -> list[dict[str, Any]]:
    """Accuracy and calibration of the ensemble in each precision, and how its predictions differ from float32's."""
    images = normalise(test.images).split(TEST_BATCH)
    rows: list[dict[str, Any]] = []
    reference = None
    for name in ("fp32 prepared", "bf16 prepared", "int8"):
        try:
            run = rivals.build(name, images[0])
        except EnsembleError as error:
            print(f"{name} is left out: {error}")
            continue
        combined = combine(torch.cat([run(batch) for batch in images], dim=1))
        reference = reference or combined
        precision = name.partition(" ")[0]
        found = score(precision, combined.probabilities.clamp_min(1e-38).log(), test.labels)
        changed = int((combined.ranking[:, 0] != reference.ranking[:, 0]).sum())
        largest = float((combined.probabilities - reference.probabilities).abs().max())
        rows.append({**asdict(found), "changed": changed, "largest": largest, "images": len(test.labels)})
    return rows


def accuracy_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Titles and cells."""
    titles = ["precision", "accuracy", "changed predictions", "largest change of a probability", "NLL (nats)", "ECE"]
    cells = [
        [
            *(row["name"], f"{row['accuracy']:.2%}", f"{row['changed']} of {row['images']}", f"{row['largest']:.4f}"),
            *(f"{row['nll']:.4f}", f"{row['ece']:.2%}"),
        ]
        for row in rows
    ]
    return [titles, *cells]


def time_table(batch: int, timings: list[Timing], differences: dict[str, float]) -> list[list[str]]:
    """Titles and cells; ratios are of medians."""
    medians = {timing.name: timing.median_ms for timing in timings}
    titles = [f"batch {batch}", "median (ms)", "p10 to p90 (ms)", "x fp32 loop", "x fp32 prepared", "difference"]
    cells = [
        [
            *(t.name, f"{t.median_ms:.2f}", f"{t.p10_ms:.2f} to {t.p90_ms:.2f}"),
            *(f"{medians[base] / t.median_ms:.2f}" for base in ("fp32 loop", "fp32 prepared")),
            f"{differences[t.name]:.1e}",
        ]
        for t in timings
    ]
    return [titles, *cells]


def show(rows: list[list[str]], markdown: bool) -> None:
    """Print a table, the first row of which are its titles."""
    titles, *cells = rows
    if markdown:
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *cells]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        return
    table = Table()
    for position, title in enumerate(titles):
        table.add_column(title, justify="right" if position else "left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the command line asks for, print it, and return the figures."""
    torch.manual_seed(0)
    test: Digits | None = None
    if options.members:
        networks = load_networks(find_members(options.members))
        _, train, test = open_data(options.data_dir, False)
        samples = list(normalise(train.images[:CALIBRATION_IMAGES]).split(32))
    else:
        networks = build_members(NETWORKS[options.model], options.count)
        samples = list(NETWORKS[options.model].make_args(8))
    rivals = Rivals(options.model, networks, samples)
    figures: dict[str, Any] = {
        "machine": describe_machine(torch.device("cpu")),
        "members": len(networks),
        "times": {},
    }
    machine = figures["machine"]
    print(
        f"{options.model}, {len(networks)} members; {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )
    if test is not None:
        figures["accuracy"] = judge(rivals, test)
        show(accuracy_table(figures["accuracy"]), options.markdown)
    for batch in options.batch:
        example = torch.cat(samples)[:1].repeat(batch, 1, 1, 1)
        timings, differences = compare_times(rivals, example, options.seconds)
        show(time_table(batch, timings, differences), options.markdown)
        figures["times"][batch] = {"timings": [asdict(t) for t in timings], "differences": differences}
    return figures


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            figures = measure(options)
    except (DataError, EnsembleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
