"""Turns four stock batching rules of vmap into faster ones, without touching the model's code.

Inside `with FastRules():` the calls F.embedding, F.linear, F.layer_norm and F.scaled_dot_product_attention of a
vmapped function go to the rules below. What a rule doesn't cover falls through to the stock rule.

A rule takes the member axis off its arguments, runs ordinary operators on (M, ...) tensors, and puts it back.
That costs about 7 us, a custom operator with torch.library.register_vmap about 90 us, and leaves autograd as is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from vmap_ensemble.execution.cpu import onednn
from vmap_ensemble.execution.cpu.onednn import can_prepack, prepack
from vmap_ensemble.execution.timing import time_call

# Up to this many rows, weights that oneDNN has reordered beforehand are faster on every CPU tried than one batched
# product of the BLAS library (15 rows: 0.23 ms against 0.51 ms). Beyond it depends on the BLAS: `_find_row_limit`.
FEW_ROWS = 64
MANY_ROWS = 512


class FastRules(TorchFunctionMode):
    """A context in which the calls listed in `RULES` use this module's batching rules.

    Args:
        weights: Key -> matrices of the model's linear layers, (M, out, in) of the members or (out, in) of all.
            They are also kept in oneDNN's order, where that applies: a CPU, float32, no gradient asked for.

    Note:
        The reordered matrices take their size in memory once more. Without `weights` there are none.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._prepacked: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for tensor in (weights or {}).values():
            if can_prepack(tensor) and tensor.data_ptr() not in self._prepacked:
                # The plain tensor is kept beside its copies, so that its address stays its own.
                self._prepacked[tensor.data_ptr()] = (tensor, prepack(tensor))
        self.row_limit = _find_row_limit(list(self._prepacked.values()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or maybe_current_level() != 1:  # no vmap, or one inside another transform
            return func(*args, **kwargs)
        result = rule(self, *args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def prepacked(self, weight: Tensor, rows: int, needs_grad: bool) -> list[Tensor] | None:
        """The reordered matrices of (M, out, in) or (out, in) weights, where they are fastest for so many rows."""
        entry = self._prepacked.get(weight.data_ptr())
        if entry is None or entry[0].shape != weight.shape or rows > self.row_limit or needs_grad:
            return None
        return entry[1]


def _find_row_limit(entries: list[tuple[Tensor, list[Tensor]]]) -> float:
    """Up to how many rows the reordered matrices are used: for many, BLAS may be faster, so that is measured.

    BLAS libraries differ more than CPUs do: MKL leaves an AMD CPU's AVX-512 alone and takes twice oneDNN's time.
    """
    if not entries:
        return FEW_ROWS
    weight, matrices = max(entries, key=lambda entry: entry[0].shape[-2:].numel())
    weight = weight.reshape(-1, *weight.shape[-2:])
    rows = torch.ones(len(weight), MANY_ROWS, weight.shape[-1])

    with torch.inference_mode():
        rivals = (lambda: _multiply_packed(rows, matrices, [None] * len(rows)), lambda: torch.bmm(rows, weight.mT))
        spans = [[time_call(rival, ())[1] for rival in rivals] for _ in range(4)]
    packed_s, plain_s = (min(column) for column in zip(*spans, strict=True))
    return float("inf") if packed_s < plain_s else FEW_ROWS


def peel(*tensors: Any) -> tuple[list[Any], list[bool]] | None:
    """Take the member axis off.

    Returns:
        The plain tensors, the axis in front where there was one, and whether there was one; None when no
        tensor is batched, or one belongs to another transform.
    """
    level = maybe_current_level()
    plain: list[Any] = []
    batched: list[bool] = []
    for tensor in tensors:
        own = tensor is not None and is_batchedtensor(tensor) and maybe_get_level(tensor) == level
        if own:
            axis = maybe_get_bdim(tensor)
            tensor = get_unwrapped(tensor)
            tensor = tensor if axis == 0 else tensor.movedim(axis, 0)
        if tensor is not None and is_functorch_wrapped_tensor(tensor):
            return None
        plain.append(tensor)
        batched.append(own)
    return (plain, batched) if any(batched) else None


def run_on_members(function: Callable[[], Tensor], axis: int = 0) -> Tensor:
    """Run a function of plain tensors and mark the member axis of its result."""
    level: Any = maybe_current_level()
    with temporarily_clear_interpreter_stack():
        result = function()
    return _add_batch_dim(result, axis, level)


def embed(
    _rules: FastRules,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """F.embedding: the stock rule copies all tables on every call; here the ids point into the stack."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    peeled = peel(input, weight)
    if peeled is None:
        return NotImplemented
    (ids, table), (ids_batched, table_batched) = peeled
    if not table_batched:
        return run_on_members(lambda: F.embedding(ids, table, padding_idx))

    def look_up() -> Tensor:
        members, rows = table.shape[:2]
        offsets = torch.arange(0, members * rows, rows, device=ids.device)
        inner = ids.ndim - 1 if ids_batched else ids.ndim
        flat = table.reshape(members * rows, -1)
        return F.embedding(ids + offsets.view(-1, *(1 for _ in range(inner))), flat)

    # padding_idx only silences a row's gradient, which one index can't do for M tables.
    if padding_idx is not None and table.requires_grad and torch.is_grad_enabled():
        return NotImplemented
    return run_on_members(look_up)


def multiply(rules: FastRules, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """F.linear: one product for all members, of as few and as large matrices as the batching allows."""
    peeled = peel(input, weight, bias)
    if peeled is None:
        return NotImplemented if is_functorch_wrapped_tensor(input) else _multiply_trunk(rules, input, weight, bias)
    (x, w, b), (x_batched, w_batched, b_batched) = peeled
    if w.ndim != 2 + w_batched or x.ndim < 2 + x_batched:
        return NotImplemented
    rows = x.numel() // max(1, x.shape[-1] * (len(x) if x_batched and w_batched else 1))
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    packed = rules.prepacked(w, rows, needs_grad)
    if not w_batched:
        return run_on_members(lambda: _multiply_shared(x, w, b, x_batched, b_batched, packed))
    if not x_batched and x.is_cuda:
        # x (..., I) is one for all: a single product with all members' rows, (..., M * O).
        return run_on_members(lambda: _multiply_once(x, w, b, b_batched), x.ndim - 1)
    # On a CPU that is slower than M products, and leaves the member axis in the middle.
    own = x if x_batched else x.expand(len(w), *x.shape)
    return run_on_members(lambda: _multiply_each(own, w, b, b_batched, packed))


def _multiply_trunk(rules: FastRules, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    """Nothing is batched: a layer that all members share, on what they share."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    packed = rules.prepacked(w, x.numel() // max(1, x.shape[-1]), needs_grad) if w.ndim == 2 else None
    return NotImplemented if packed is None else _multiply_row(x, packed[0], b)


def _multiply_shared(
    x: Tensor, w: Tensor, b: Tensor | None, x_batched: bool, b_batched: bool, packed: list[Tensor] | None
) -> Tensor:
    own_bias = b is not None and b_batched
    inner = None if own_bias else b
    y = F.linear(x, w, inner) if packed is None else _multiply_row(x, packed[0], inner)
    if b is None or not own_bias:
        return y
    y = y if x_batched else y.unsqueeze(0)
    return y + b.view(len(b), *(1 for _ in range(y.ndim - 2)), -1)


def _multiply_once(x: Tensor, w: Tensor, b: Tensor | None, b_batched: bool) -> Tensor:
    members, out, width = w.shape
    flat_bias = None if b is None else (b if b_batched else b.expand(members, -1)).reshape(-1)
    y = F.linear(x, w.reshape(members * out, width), flat_bias)
    return y.view(*y.shape[:-1], members, out)


def _multiply_each(x: Tensor, w: Tensor, b: Tensor | None, b_batched: bool, packed: list[Tensor] | None) -> Tensor:
    members, out, width = w.shape
    rows = x.reshape(members, -1, width)
    if packed is not None:
        biases = list(b.unbind()) if b is not None and b_batched else [b] * members
        y = _multiply_packed(rows, packed, biases)
    elif b is None:
        y = torch.bmm(rows, w.mT)
    else:
        y = torch.baddbmm(b.unsqueeze(1) if b_batched else b, rows, w.mT)
    return y.view(*x.shape[:-1], out)


def _multiply_packed(rows: Tensor, matrices: list[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """(M, R, in) by M reordered matrices -> (M, R, out)."""
    triples = zip(rows.unbind(), matrices, biases, strict=True)
    return torch.stack([_multiply_row(row, matrix, bias) for row, matrix, bias in triples])


def _multiply_row(row: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return onednn.multiply(row, matrix, bias)


def normalise(
    _rules: FastRules,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """F.layer_norm: normalise all members at once, then scale and shift in one pass instead of two."""
    peeled = peel(input, weight, bias)
    if peeled is None:
        return NotImplemented
    (x, w, b), (x_batched, w_batched, b_batched) = peeled
    shape = tuple(normalized_shape)
    if not (w_batched or b_batched):
        return run_on_members(lambda: F.layer_norm(x, shape, w, b, eps))
    if w is None or b is None:
        return NotImplemented

    def scale_and_shift() -> Tensor:
        y = F.layer_norm(x, shape, eps=eps)
        y = y if x_batched else y.unsqueeze(0)
        inner = [1] * (y.ndim - 1 - len(shape))
        return torch.addcmul(
            b.view(len(b), *inner, *shape) if b_batched else b,
            y,
            w.view(len(w), *inner, *shape) if w_batched else w,
        )

    return run_on_members(scale_and_shift)


def attend(
    _rules: FastRules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention: members folded into the batch, so that the fused kernels apply.

    A mask that isn't mapped is expanded over the members; the stock rule hands it to kernels that refuse it
    (https://github.com/pytorch/pytorch/issues/151558).
    """
    peeled = peel(query, key, value, attn_mask)
    if peeled is None or dropout_p:
        return NotImplemented
    (q, k, v, mask), batched = peeled
    if any(t.ndim != 4 + own for t, own in zip((q, k, v), batched, strict=False)):
        return NotImplemented
    members = next(len(t) for t, own in zip((q, k, v, mask), batched, strict=True) if own)

    def fold(tensor: Tensor, own: bool) -> Tensor:
        tensor = tensor if own else tensor.unsqueeze(0).expand(members, *tensor.shape)
        return tensor.reshape(-1, *tensor.shape[2:])

    def attend_folded() -> Tensor:
        y = F.scaled_dot_product_attention(
            fold(q, batched[0]),
            fold(k, batched[1]),
            fold(v, batched[2]),
            attn_mask=_fold_mask(mask, batched[3], members, q.shape[-4]),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return y.view(members, -1, *y.shape[1:])

    return run_on_members(attend_folded)


def _fold_mask(mask: Tensor | None, own: bool, members: int, batch: int) -> Tensor | None:
    """A mask that broadcasts to (B, heads, S, S), or (M, ...) of those -> (M * B, heads or 1, S or 1, S)."""
    if mask is None:
        return None
    inner = mask.shape[1:] if own else mask.shape
    four = (*(1 for _ in range(4 - len(inner))), *inner)
    mask = mask.view(-1 if own else 1, *four).expand(members, batch, *four[1:])
    return mask.reshape(members * batch, *four[1:])


RULES: dict[Any, Callable[..., Any]] = {
    F.embedding: embed,
    F.linear: multiply,
    F.layer_norm: normalise,
    F.scaled_dot_product_attention: attend,
}
