"""Turns a Hugging Face BERT checkpoint into one TorchScript file that computes its real tokens alone.

    python -m fastertransformer.trace --mode question_answering --model_name_or_path folder --tokenizer_name folder \\
        --batch_size 1 --max_seq_length 128 --data_type fp32 --model_type thsext --output traced_model.pt

The options are those of the FasterTransformer recipe. --model_type: `thsext` uses the library, `ths` is plain
TorchScript, `ori` runs the checkpoint itself and writes nothing. The file takes (input_ids, attention_mask), and
token_type_ids if given as a third argument; it serves any batch size and any length up to --max_seq_length.
--batch_size only sizes the example on which the file is compared with the checkpoint before it is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastertransformer import LIBRARY

# Keys of HEADS in modules.py.
MODES = ("question_answering", "sequence_classification", "token_classification")
DTYPES = ("bf16", "fp16", "fp32")


def parse_bool(text: str) -> bool:
    """Return the flag that a text names; the recipe allows a bare option as well."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the recipe's options."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Trace a BERT checkpoint for libpyt_fastertransformer.so."
    )
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--model_name_or_path", required=True, help="a Hugging Face directory or name")
    parser.add_argument("--tokenizer_name", help="its tokenizer is saved beside --output (default: none is)")
    parser.add_argument("--batch_size", type=int, default=1, help="texts in the example (any number is served)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="longest input that the file accepts")
    parser.add_argument("--data_type", default="fp32", choices=DTYPES)
    parser.add_argument("--model_type", default="thsext", choices=["ori", "ths", "thsext"])
    parser.add_argument("--ths_path", type=Path, default=LIBRARY, help="the library (default: built if missing)")
    parser.add_argument("--remove_padding", nargs="?", const=True, default=True, type=parse_bool)
    parser.add_argument("--do_lower_case", nargs="?", const=True, default=None, type=parse_bool)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("traced_model.pt"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trace from the command line; 1 if it can't be done."""
    options = parse_arguments(arguments)
    from fastertransformer.tracing import trace_asked  # after the arguments: it imports torch

    return trace_asked(options)


if __name__ == "__main__":
    sys.exit(main())
