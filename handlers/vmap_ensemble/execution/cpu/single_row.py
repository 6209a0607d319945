"""Turns members' matrices into the order in which a single row is multiplied the fastest, and multiplies it.

A single row reads each weight once, so memory is the limit. A matrix whose inputs' weights lie together needs to be
read only where the input isn't 0: behind a relu that is a part of it, of a trained MNIST network's 15 %, and the
result is the same. The kernel is kernels/single_row.cpp.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from vmap_ensemble.execution.cpu.kernel_library import instruction_set, load_library

_DTYPES = (torch.float32, torch.bfloat16)
_Sizes = ctypes.c_int64 * 3


@dataclass(frozen=True)
class RowMatrices:
    """M matrices, panel by panel of filters, in each panel input by input.

    Attributes:
        values: (M, out * in), float32 or bfloat16.
        columns: in.
        filters: out.
    """

    values: Tensor
    columns: int
    filters: int

    @classmethod
    def of(cls, weight: Tensor) -> RowMatrices:
        """From plain ones, (M, out, in).

        Raises:
            ValueError: There are `reasons_against` them.
        """
        library, reasons = load_library(), reasons_against(weight)
        if library is None or reasons:
            raise ValueError(f"expected matrices for the kernel of single rows, got some that are {reasons}")
        count, filters, columns = weight.shape
        values, start = torch.empty(count, filters * columns, dtype=weight.dtype), 0
        for panel in weight.split(library.single_row_panel(), dim=1):
            end = start + panel.shape[1] * columns
            values[:, start:end].unflatten(1, (columns, -1)).copy_(panel.mT)
            start = end
        return cls(values, columns, filters)

    def multiply(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """(M, 1, in) and (M, out) -> (M, 1, out), all of the matrices' dtype; activation is none or relu.

        Raises:
            RuntimeError: Another shape or dtype than the matrices take, or no memory.
        """
        library, count = load_library(), len(self.values)
        if x.shape != (count, 1, self.columns) or x.dtype != self.values.dtype:
            expected = f"{self.values.dtype} ({count}, 1, {self.columns})"
            raise RuntimeError(f"linear layer: expected {expected}, got {x.dtype} {tuple(x.shape)}")
        x, y = x.contiguous(), x.new_empty(count, 1, self.filters)
        bias = None if bias is None else bias.contiguous()
        done = library.single_row_multiply(  # type: ignore[union-attr]
            *(x.dtype == torch.bfloat16, x.data_ptr(), self.values.data_ptr()),
            *(None if bias is None else bias.data_ptr(), y.data_ptr(), _Sizes(count, self.columns, self.filters)),
            *(activation == "relu", torch.get_num_threads()),
        )
        if not done:
            raise RuntimeError("can't allocate memory for the inputs of a linear layer")
        return y


def reasons_against(weight: Tensor) -> list[str]:
    """Why the kernel doesn't take the members' matrices, (M, out, in); empty if it does."""
    target = instruction_set()
    if target is None or load_library() is None:
        return ["no kernel here"]
    reasons = []
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        reasons.append(f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}")
    _, filters, columns = weight.shape
    if filters % target.lanes:
        reasons.append(f"no multiple of {target.lanes} outputs")
    if columns >= 2**31:
        reasons.append("too many inputs")
    # Every 0 is left out, whatever it would be multiplied by: 0 * inf isn't 0. Looked at last: it reads all weights.
    if not reasons and not bool(weight.isfinite().all()):
        reasons.append("not finite")
    return reasons
