"""Turns the C++ sources here into libpyt_fastertransformer.so, and BERT checkpoints into TorchScript that uses it."""

from pathlib import Path

# Where the library is built for this repository.
LIBRARY = Path(__file__).resolve().parent.parent / "build" / "libpyt_fastertransformer.so"
