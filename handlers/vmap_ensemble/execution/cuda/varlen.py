"""Turns attention within texts of any length into one call of CUDA's flash attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_varlen` takes tensors of this kind."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
    """Attention of all members within each of their texts: the members' rows are one longer row.

    Args:
        query, key, value: (M, T, heads, D), float16 or bfloat16, on a GPU.
        ends: (M * B + 1,) int32: where each text of each member begins, and the end.
        longest: Tokens of the longest text.
        scale: Of the scores.

    Returns:
        (M, T, heads, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    members, tokens = query.shape[:2]
    q, k, v = (t.reshape(members * tokens, *t.shape[2:]) for t in (query, key, value))
    y: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale)
    return y.view(query.shape)
