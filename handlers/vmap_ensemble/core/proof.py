"""Turns a vmapped forward and a sample batch into a proof that each member's slice is that member's own output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.errors import LoadError

# Largest difference relative to the member's largest output. The order of summation differs between one
# grouped and M plain convolutions or products; these bounds are ten times what that cost in the models tried.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def default_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The bound for outputs of a dtype; where a GPU may use TF32 for float32, that of its 10 bits of mantissa."""
    admits_tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    if dtype == torch.float32 and device.type == "cuda" and admits_tf32:
        return TOLERANCE[torch.float16]
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Proof:
    """What the comparison of the vmapped forward with the members' own forwards has shown.

    Attributes:
        largest_difference: max |vmapped - own| / max |own| over all members and outputs.
        argmax_agreement: Share of positions whose arg max along the last axis agrees.
        tolerance: The bound that the difference was held against.
        not_finite: Members whose own output on the sample has NaN or infinity.
    """

    largest_difference: float
    argmax_agreement: float
    tolerance: float
    not_finite: tuple[str, ...]


def prove_equal(forward: Forward, run: Any, args: tuple[Any, ...], tolerance: float | None = None) -> Proof:
    """Compare `run(*args)` with every member's own plain forward.

    Args:
        forward: Gives the members and their plain forwards.
        run: What will serve: takes the same arguments and returns (M, B, ...) tensors.
        args: A sample batch.
        tolerance: Largest relative difference; by default the forward's own, or that of the output's dtype.

    Raises:
        LoadError: The difference of a member is beyond the tolerance, or the outputs differ in structure.
    """
    return compare_outputs(forward, run(*args), own_outputs(forward, args), args, tolerance)


def own_outputs(forward: Forward, args: tuple[Any, ...]) -> list[list[Any]]:
    """What each member's own plain forward gives: per member the leaves of its output, (B, ...) tensors."""
    members = range(len(forward.members.names))
    return [pytree.tree_leaves(forward.comparable(forward.member(index, *args), args, 0)) for index in members]


def find_row_dependence(
    forward: Forward, args: tuple[Any, ...], rows: Sequence[tuple[Any, ...]], tolerance: float | None = None
) -> float | None:
    """How far the answer to an example depends on its neighbours in the batch; None if it doesn't.

    Batch norm without running statistics takes them from the batch; a convolution over texts sees the padding that
    its neighbours need. It is the architecture's doing, so the first member's own forward is asked.

    Args:
        forward: Gives the members' own forwards.
        args: A batch of several examples, (B, ...) each.
        rows: The arguments of each of these examples alone, in order, with as much padding as it needs itself.
        tolerance: As of `prove_equal`.

    Returns:
        The largest difference between batch and alone, relative to the largest output, if it is beyond the tolerance.
    """
    together = pytree.tree_leaves(forward.comparable(forward.member(0, *args), args, 0))
    alone = [pytree.tree_leaves(forward.comparable(forward.member(0, *row), row, 0)) for row in rows]
    worst = 0.0
    for leaf, *own in zip(together, *alone, strict=True):
        if not isinstance(leaf, Tensor) or not leaf.dim():
            continue
        bound = tolerance or forward.tolerance or default_tolerance(leaf.dtype, leaf.device)
        start = 0
        for part in own:
            both = leaf[start : start + len(part)], part
            start += len(part)
            # What is alone needs less padding: outputs per token are compared as far as both go.
            sizes = [min(sizes) for sizes in zip(*(tensor.shape for tensor in both), strict=True)]
            difference, _ = _relative_difference(*(tensor[tuple(map(slice, sizes))] for tensor in both))
            worst = max(worst, difference if not difference <= bound else 0.0)
    return worst or None


def split_members(forward: Forward, outputs: Any, args: tuple[Any, ...]) -> list[list[Any]]:
    """What `own_outputs` would give, from the loop's outputs (M, B, ...): nothing is computed again."""
    leaves = pytree.tree_leaves(forward.comparable(outputs, args, 1))
    return [[leaf[index] for leaf in leaves] for index in range(len(forward.members.names))]


def compare_outputs(
    forward: Forward,
    outputs: Any,
    own: list[list[Any]],
    args: tuple[Any, ...],
    tolerance: float | None = None,
) -> Proof:
    """Compare outputs (M, B, ...) with what `own_outputs` gave for the same arguments.

    Raises:
        LoadError: As `prove_equal`.
    """
    together = pytree.tree_leaves(forward.comparable(outputs, args, 1))
    largest, agreements, bound = 0.0, [], 0.0
    not_finite = []
    for index, (name, own_leaves) in enumerate(zip(forward.members.names, own, strict=True)):
        if len(own_leaves) != len(together):
            raise LoadError(
                f"member '{name}': expected {len(own_leaves)} outputs, got {len(together)} from the vmapped forward"
            )
        for expected, stacked in zip(own_leaves, together, strict=True):
            if not isinstance(expected, Tensor):
                continue
            ours = stacked[index]
            if expected.shape != ours.shape:
                raise LoadError(
                    f"member '{name}': own forward gives {tuple(expected.shape)}, the vmapped one {tuple(ours.shape)}"
                )
            bound = tolerance or forward.tolerance or default_tolerance(expected.dtype, expected.device)
            difference, finite = _relative_difference(expected, ours)
            if not finite:
                not_finite.append(name)
            if not difference <= bound:
                raise LoadError(
                    f"member '{name}': the vmapped forward differs from the member's own by {difference:.2e} "
                    f"(relative), more than the tolerance {bound:.0e}; refusing to serve. See docs/limits.md"
                )
            largest = max(largest, difference)
            agreements.append(_argmax_agreement(expected, ours))
    agreement = sum(agreements) / max(len(agreements), 1)
    return Proof(largest, agreement, bound, tuple(dict.fromkeys(not_finite)))


def _argmax_agreement(own: Tensor, ours: Tensor) -> float:
    return (own.argmax(-1) == ours.argmax(-1)).float().mean().item() if own.dim() else 1.0


def _relative_difference(own: Tensor, ours: Tensor) -> tuple[float, bool]:
    """max |own - ours| / max |own| where both are finite; infinite where only one of them is."""
    own, ours = own.double(), ours.double()
    finite = own.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf"), False
    if not finite.any():
        return 0.0, False
    scale = own[finite].abs().max().clamp_min(1e-30)
    return ((own - ours)[finite].abs().max() / scale).item(), bool(finite.all())
