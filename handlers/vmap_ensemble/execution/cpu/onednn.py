"""Turns layers into calls of oneDNN: each of its private operators is named here and nowhere else."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmap_ensemble.execution.graph.lowered_model import UnsupportedModel

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers


def check_dtypes(members: StackedMembers) -> None:
    """Refuse dtypes for which the device has no kernels of its own: oneDNN would convert at every step.

    Raises:
        UnsupportedModel: Names the dtype, and what takes it.
    """
    fast = {torch.float32, torch.float16, torch.bfloat16}
    if members.device.type == "cpu":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            fast.discard(torch.bfloat16)
        if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            fast.discard(torch.float16)
    found = {str(tensor.dtype) for tensor in members.tensors() if tensor.is_floating_point()}
    wrong = sorted(found - set(map(str, fast)))
    if wrong:
        raise UnsupportedModel(
            f"this device has no fast convolution of {', '.join(wrong)}, only of "
            f"{', '.join(sorted(map(str, fast)))}; use one of these, or eager or compiled"
        )


LINEAR = torch.ops.mkldnn._linear_pointwise.default
_CONVOLVE = torch.ops.mkldnn._convolution_pointwise.default
_ADD = torch.ops.mkldnn._convolution_pointwise.binary
_ADD_IN_PLACE = torch.ops.mkldnn._convolution_pointwise_.binary
# Order for products of about so many rows: for one as well (9216 to 128 on one core, 0.14 ms against 0.20 ms packed
# for one row, and 0.18 ms plain; 8 rows 0.21 ms against 0.51 ms plain).
PACKED_FOR_ROWS = 16


def can_prepack(tensor: Tensor) -> bool:
    """Whether oneDNN can reorder these matrices: (M, out, in) or (out, in), float32, on a CPU that has it."""
    return (
        tensor.ndim in (2, 3)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    )


def prepack(weight: Tensor) -> list[Tensor]:
    """(M, out, in) -> M matrices in the order of oneDNN's product with few rows; one for (out, in)."""
    rows = weight.unbind() if weight.ndim == 3 else (weight,)
    return [torch.ops.mkldnn._reorder_linear_weight(row.contiguous(), PACKED_FOR_ROWS) for row in rows]


@functools.cache
def products_saturate() -> bool:
    """Whether this CPU's products of uint8 by int8 lose large sums.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits (vpmaddubsw), which end at 32,767: two products
    of 255 by 127 are 64,770.
    """
    x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [1, 64])
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    arguments: tuple[Any, ...] = (x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return not torch.equal(torch.ops.onednn.qlinear_pointwise(*arguments), torch.full((1, 16), 255.0 * 127 * 64))
