"""Finds the library that reads and writes Parquet, which only tables in that form need."""

from __future__ import annotations

import importlib
from typing import Any

from vmap_ensemble.errors import EnsembleError


class NoParquet(EnsembleError):
    """pyarrow isn't installed."""


def import_parquet(name: str) -> Any:
    """pyarrow.parquet.

    Args:
        name: The file that needs it.

    Raises:
        NoParquet: It isn't installed; one line that says how to.
    """
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise NoParquet(f"{name}: Parquet needs pyarrow; pip install 'vmap-ensemble[offline]'") from None
