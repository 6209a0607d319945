"""Turns the C++ sources here into libpyt_fastertransformer.so, and BERT checkpoints into TorchScript that uses it."""

import sys
from pathlib import Path

# handlers/ is the root of every archive, so its package is imported as `vmap_ensemble` here as well.
_HANDLERS = str(Path(__file__).resolve().parent.parent / "handlers")
if _HANDLERS not in sys.path:
    sys.path.insert(0, _HANDLERS)
