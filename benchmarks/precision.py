"""Members in float32, bfloat16 and int8 -> what each precision costs in accuracy, and what it gains in time.

    python -m benchmarks.precision --members training/members/mnist
    python -m benchmarks.precision --model resnet18 --count 4
    python -m benchmarks.precision --model minilm --count 4

MNIST members are judged on the test images; int8 is calibrated on training images. Without `--members` the networks
have random weights, and only times and differences are measured. Encoders are MiniLM with a random head each. Rivals
in 8 bits: ONNX Runtime (static for images, dynamic for texts) and OpenVINO with NNCF, on the same samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import TEXT_MODEL, TEXTS
from training.options import positive


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.precision", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=("mnist", "resnet18", "resnet50", TEXT_MODEL), default="mnist")
    add("--members", type=Path, nargs="+", help="MNIST checkpoints, or folders of them; else random weights")
    add("--count", type=positive(int), default=8, help="members with random weights")
    add("--batch", type=positive(int), nargs="*", default=[1, 8], help="batch sizes of images; none times nothing")
    add("--texts", choices=TEXTS, nargs="+", default=["single", "full"], help="batches of texts to time")
    add("--data-dir", type=Path, help="folder with MNIST's files, or the word sample; as in training.mnist")
    add("--threads", type=positive(int), help="threads of torch")
    add("--seconds", type=float, default=30.0, help="about how long to measure per batch size")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.members and options.model != "mnist":
        parser.error("--members are MNIST checkpoints; other models have weights of their own here")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from benchmarks.runs.precision import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
