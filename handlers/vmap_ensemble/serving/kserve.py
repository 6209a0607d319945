"""Turns KServe v1 and v2 bodies into items, one per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from vmap_ensemble.errors import RequestError
from vmap_ensemble.tasks.images.decoding import decode_base64

MAX_ITEMS = 1024
MAX_INPUTS = 64
# NumPy, which reads what is nested, has no more axes than 64; models have fewer.
MAX_AXES = 16
# Characters of a request that an error quotes.
QUOTED = 80
Envelope = Literal["single", "list", "kserve_v1", "kserve_v2"]


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Datatype -> whether a value of JSON is one. BYTES are text; raw bytes have no form in JSON but base64.
DATATYPES: dict[str, Callable[[Any], bool]] = {
    "BOOL": lambda value: isinstance(value, bool),
    **{f"UINT{bits}": _is_whole(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": _is_whole(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **dict.fromkeys(("FP16", "FP32", "FP64", "BF16"), _is_number),
    "BYTES": lambda value: isinstance(value, str),
}
# What the parameters of an input may say of its data; MLServer's clients send it.
CONTENT_TYPES = ("str", "base64", "np")
# What an input may hold; anything else would be ignored without a word, an option among them.
INPUT_KEYS = ("name", "shape", "datatype", "data", "parameters")


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

    Several inputs (`question` and `context`, say) become one record per row. BYTES stay text, or become bytes where
    the input's parameters say `"content_type": "base64"`; numbers are nested lists in the tensor's shape.

    Raises:
        RequestError: 400 where an input's data, datatype and shape don't match, or the inputs differ in rows; 413 for
            too many inputs.
    """
    if len(inputs) > MAX_INPUTS:
        raise RequestError(413, f"inputs: {len(inputs)}; at most {MAX_INPUTS} are read")
    columns: dict[str, list[Any]] = {}
    for number, tensor in enumerate(inputs):
        name = tensor.get("name", f"input-{number}")
        if not isinstance(name, str):
            raise RequestError(400, f"inputs[{number}].name: expected text, got {type(name).__name__}")
        if name in columns:
            raise RequestError(400, f"inputs.{quote(name)}: expected one input of this name, got several")
        columns[name] = _read_input(tensor, f"inputs.{quote(name)}")
    lengths = sorted({len(rows) for rows in columns.values()})
    if len(lengths) > 1:
        raise RequestError(400, f"inputs: expected the same first size in all, got {quote(lengths)}")
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def quote(value: Any) -> str:
    """A value of a request as an error may show it: short."""
    text = str(value)
    return text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"


def _read_input(tensor: Mapping[str, Any], where: str) -> list[Any]:
    """The rows of one input, nested in its shape."""
    data = tensor["data"]
    if not isinstance(data, list):
        raise RequestError(400, f"{where}.data: expected a list, got {type(data).__name__}")
    shape = _read_shape(tensor.get("shape"), len(data), where)
    flat = _flatten(data, shape, where)
    flat = _decode(flat, tensor.get("parameters"), _check_values(flat, tensor.get("datatype"), where), where)
    return _nest(flat, shape)


def _read_shape(shape: Any, length: int, where: str) -> list[int]:
    if shape is None or shape == []:
        return [length]
    # A size of 0 beside a huge one would multiply to nothing and still be nested.
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_whole(1, 2**63 - 1), shape)):
        raise RequestError(400, f"{where}.shape: expected a list of at most {MAX_AXES} sizes of at least 1")
    return shape


def _flatten(data: list[Any], shape: list[int], where: str) -> list[Any]:
    """The values of data that is flat, or nested as its shape says, but for axes of one."""
    flat, lengths = data, [len(data)]
    while any(isinstance(row, list) for row in flat):
        if not all(isinstance(row, list) for row in flat):
            raise RequestError(400, f"{where}.data: expected values or lists, got both side by side")
        if len(lengths) >= MAX_AXES:
            raise RequestError(400, f"{where}.data: lists are nested deeper than {MAX_AXES}")
        if any(len(row) != len(flat[0]) for row in flat):
            raise RequestError(400, f"{where}.data: lists of other lengths than shape {quote(shape)} says")
        lengths.append(len(flat[0]))
        flat = [value for row in flat for value in row]
    if math.prod(shape) != len(flat):
        raise RequestError(400, f"{where}: {len(flat)} values don't fill shape {quote(shape)}")
    if len(lengths) > 1 and [n for n in lengths if n != 1] != [n for n in shape if n != 1]:
        raise RequestError(400, f"{where}.data: lists of other lengths than shape {quote(shape)} says")
    return flat


def _check_values(flat: list[Any], datatype: Any, where: str) -> str | None:
    """The datatype of an input, if it says one, and all its values are of it."""
    if datatype is None:
        return None
    is_value = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if is_value is None:
        raise RequestError(400, f"{where}.datatype: expected one of {', '.join(DATATYPES)}, got {quote(datatype)}")
    if not all(map(is_value, flat)):
        raise RequestError(400, f"{where}.data: expected values of datatype {datatype}")
    return str(datatype)


def _decode(flat: list[Any], parameters: Any, datatype: str | None, where: str) -> list[Any]:
    """Values as their content type says: text, bytes in base64, or numbers."""
    kind = parameters.get("content_type") if isinstance(parameters, Mapping) else None
    if kind is None:
        return flat
    if kind not in CONTENT_TYPES:
        expected = ", ".join(CONTENT_TYPES)
        raise RequestError(400, f"{where}.parameters.content_type: expected one of {expected}, got {quote(kind)}")
    if datatype is not None and (kind == "np") == (datatype == "BYTES"):
        raise RequestError(400, f"{where}.parameters.content_type: {kind} doesn't go with datatype {datatype}")
    if kind != "base64":
        return flat
    if not all(isinstance(value, str) for value in flat):
        raise RequestError(400, f"{where}.data: expected base64")
    return [decode_base64(value, f"{where}.data") for value in flat]


def _nest(values: list[Any], sizes: list[int]) -> list[Any]:
    for size in reversed(sizes[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


def checked_items(items: list[Any], key: str) -> tuple[Any, ...]:
    if not items:
        raise RequestError(400, f"'{key}' is empty; expected at least one item")
    if len(items) > MAX_ITEMS:
        raise RequestError(413, f"'{key}' holds {len(items)} items; at most {MAX_ITEMS} are answered at once")
    return tuple(items)
