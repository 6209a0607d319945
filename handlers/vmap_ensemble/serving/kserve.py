"""Turns KServe v1 and v2 bodies into items, one per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vmap_ensemble.errors import RequestError

MAX_ITEMS = 1024
Envelope = Literal["single", "list", "kserve_v1", "kserve_v2"]


def split_items(payload: dict[str, Any]) -> tuple[tuple[Any, ...], Envelope]:
    """Recognise KServe v1 ({"instances": [...]}) and v2 ({"inputs": [{"name", "shape", "data", ...}]})."""
    if isinstance(payload.get("instances"), list):
        return checked_items(payload["instances"], "instances"), "kserve_v1"
    inputs = payload.get("inputs")
    if isinstance(inputs, list) and inputs and all(isinstance(i, dict) and "data" in i for i in inputs):
        return checked_items(kserve_v2_items(inputs), "inputs"), "kserve_v2"
    return (payload,), "single"


def kserve_v2_items(inputs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Turn KServe v2 input tensors into one item per row of their first axis.

    Several inputs (`question` and `context`, say) become one record per row. BYTES stay text; numbers are
    nested lists in the tensor's shape.

    Raises:
        RequestError: 400 where an input's data and shape don't match, or the inputs differ in rows.
    """
    columns: dict[str, list[Any]] = {}
    for number, tensor in enumerate(inputs):
        name = str(tensor.get("name", f"input-{number}"))
        data = tensor["data"]
        if not isinstance(data, list):
            raise RequestError(400, f"inputs.{name}.data: expected a list, got {type(data).__name__}")
        shape = tensor.get("shape") or [len(data)]
        # A size of 0 beside a huge one would multiply to nothing and still be nested.
        if not isinstance(shape, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape
        ):
            raise RequestError(400, f"inputs.{name}.shape: expected a list of sizes of at least 1")
        if name in columns:
            raise RequestError(400, f"inputs.{name}: expected one input of this name, got several")
        columns[name] = _rows(data, [int(n) for n in shape], name)
    lengths = {len(rows) for rows in columns.values()}
    if len(lengths) > 1:
        raise RequestError(400, f"inputs: expected the same first size in all, got {sorted(lengths)}")
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _rows(data: list[Any], shape: list[int], name: str) -> list[Any]:
    flat = data
    while any(isinstance(row, list) for row in flat):
        if not all(isinstance(row, list) for row in flat):
            raise RequestError(400, f"inputs.{name}.data: expected values or lists, got both side by side")
        flat = [value for row in flat for value in row]
    if math.prod(shape) != len(flat):
        raise RequestError(400, f"inputs.{name}: {len(flat)} values don't fill shape {shape}")

    def nest(values: list[Any], sizes: list[int]) -> list[Any]:
        if len(sizes) <= 1:
            return values
        step = len(values) // sizes[0] if sizes[0] else 0
        return [nest(values[i * step : (i + 1) * step], sizes[1:]) for i in range(sizes[0])]

    return nest(flat, shape)


def checked_items(items: list[Any], key: str) -> tuple[Any, ...]:
    if not items:
        raise RequestError(400, f"'{key}' is empty; expected at least one item")
    if len(items) > MAX_ITEMS:
        raise RequestError(413, f"'{key}' holds {len(items)} items; at most {MAX_ITEMS} are answered at once")
    return tuple(items)
