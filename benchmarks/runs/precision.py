"""Members in each precision -> tables of accuracy and of times."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.int8_engines import StaticInt8
from benchmarks.measuring.measure import Timing, describe_machine, describe_versions
from benchmarks.measuring.networks import NETWORKS, build_members, device_of, states_of
from benchmarks.measuring.precisions import Agreement, drop_hopeless, figures_of, show, time_for, time_table
from benchmarks.options import TEXT_MODEL
from benchmarks.runs.precision_texts import measure_texts
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
CALIBRATION_NOISE = 32
UNSEEN = 64  # inputs that outputs are compared on
BASES = ("fp32 loop", "fp32 prepared")

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

    names = (
        "fp32 loop",
        "fp32 prepared",
        "bf16 loop",
        "bf16 prepared",
        "fp16 loop",
        "fp16 prepared",
        "int8",
        "int8 ONNX Runtime",
        "int8 OpenVINO",
    )

    def __init__(self, model: str, networks: list[nn.Module], samples: list[Tensor], folder: Path) -> None:
        self.model, self.networks, self.samples = model, networks, samples
        self.engines = StaticInt8(networks, samples, folder)
        self.members = stack_members(states_of(networks), device=device_of(networks[0]), share=False)
        self.ranges: Any = None

    def build(self, name: str, example: Tensor) -> Forward:
        """Make a rival for batches like the example.

        Raises:
            EnsembleError: It can't be had on this machine; the text says why.
        """
        precision, _, way = name.partition(" ")
        if way == "ONNX Runtime":
            return self.engines.onnxruntime(example)
        if way == "OpenVINO":
            return self.engines.openvino(example)
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


def compare_times(
    rivals: Rivals, example: Tensor, unseen: Tensor, seconds: float
) -> tuple[list[Timing], dict[str, Agreement]]:
    """Time each rival in turns on one batch; also how it agrees with the float32 loop on inputs of no calibration."""
    runs: dict[str, Callable[[], Tensor]] = {}
    forwards: dict[str, Forward] = {}
    for name in rivals.names:
        try:
            forward = forwards[name] = rivals.build(name, example)
        except EnsembleError as error:
            print(f"{name} is left out: {error}")
            continue
        runs[name] = lambda forward=forward: forward(example)  # type: ignore[misc]
    runs, round_ms = drop_hopeless(runs, "fp32 loop")
    outputs = {name: torch.cat([forwards[name](x) for x in unseen.split(len(example))], dim=1) for name in runs}
    agreements = {name: Agreement.of(outputs["fp32 loop"], output) for name, output in outputs.items()}
    return time_for(runs, round_ms, seconds), agreements


def judge(rivals: Rivals, test: Digits) -> list[dict[str, Any]]:
    """Accuracy and calibration of the ensemble in each precision, and how its predictions differ from float32's."""
    images = normalise(test.images).split(TEST_BATCH)
    rows: list[dict[str, Any]] = []
    reference = None
    for name in ("fp32 prepared", "bf16 prepared", "int8", "int8 ONNX Runtime", "int8 OpenVINO"):
        try:
            run = rivals.build(name, images[0])
        except EnsembleError as error:
            print(f"{name} is left out: {error}")
            continue
        combined = combine(torch.cat([run(batch) for batch in images], dim=1))
        reference = reference or combined
        found = score(name.removesuffix(" prepared"), combined.probabilities.clamp_min(1e-38).log(), test.labels)
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


def measure_images(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Judge and time classifiers of images, print the tables, and return the figures."""
    test: Digits | None = None
    if options.members:
        networks = load_networks(find_members(options.members))
        _, train, test = open_data(options.data_dir, False)
        samples = list(normalise(train.images[:CALIBRATION_IMAGES]).split(32))
        unseen = normalise(test.images[:UNSEEN])
    else:
        networks = build_members(NETWORKS[options.model], options.count)
        samples = [NETWORKS[options.model].make_args(8)[0] for _ in range(CALIBRATION_NOISE // 8)]
        unseen = NETWORKS[options.model].make_args(UNSEEN)[0]
    rivals = Rivals(options.model, networks, samples, folder)
    figures: dict[str, Any] = {"members": len(networks), "times": {}}
    print(f"{options.model}, {len(networks)} members, calibrated on {sum(map(len, samples))} inputs")
    if test is not None:
        figures["accuracy"] = judge(rivals, test)
        show(accuracy_table(figures["accuracy"]), options.markdown)
    for batch in options.batch:
        example = samples[0][:1].repeat(batch, 1, 1, 1)
        timings, agreements = compare_times(rivals, example, unseen, options.seconds)
        show(time_table(f"batch {batch}", timings, agreements, BASES), options.markdown)
        figures["times"][batch] = figures_of(timings, agreements)
    return figures


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = describe_machine(torch.device("cpu")) | describe_versions("onnxruntime", "openvino", "nncf")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    torch.manual_seed(0)
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            if options.model == TEXT_MODEL:
                figures = measure_texts(options, Path(folder))
            else:
                figures = measure_images(options, Path(folder))
    except (DataError, EnsembleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")
    return 0
