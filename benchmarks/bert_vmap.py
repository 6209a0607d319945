"""Members of a Hugging Face encoder -> their time one after another, vmapped, and with each step of ours.

python -m benchmarks.bert_vmap --json bert.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import TEXTS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.bert_vmap",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", type=Path, default=None, help="folder of save_pretrained; MiniLM by default")
    add("--num_models", type=int, default=4, help="members; all but the first are perturbed copies")
    add("--max_length", type=int, default=128, help="what the loop of the first row pads to")
    add("--threads", type=int, default=None, help="of torch and of ONNX Runtime; without it, torch decides")
    add("--warmup", type=int, default=5, help="calls that are not counted")
    add("--iterations", type=int, default=50, help="calls that are counted")
    add("--block", type=int, default=2, help="calls of one rival in a row")
    add("--batches", nargs="+", default=list(TEXTS), choices=TEXTS)
    add("--heads", type=int, default=16, help="heads on one trunk in the last table; 0 for none")
    add("--skip", nargs="*", default=[], choices=["onnxruntime", "compile"], help="peers to leave out")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    from benchmarks.runs.bert_vmap import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
