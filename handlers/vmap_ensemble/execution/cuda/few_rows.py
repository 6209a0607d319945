"""Chooses, layer by layer, between torch's kernels and Triton's for few rows of every member.

A kernel of few_rows_kernels.py serves a layer once it was held against torch's there: equal, and measured faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmap_ensemble.core.proof import default_tolerance
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.graph.steps import LINEAR_ACTIVATIONS, multiply_members

logger = logging.getLogger(__name__)

Work = Callable[[], Tensor]
PLAIN = "torch"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of what ways to run a whole forward may differ by: what a single layer may.
LAYER = 1 / 5
_MEASURE_MS = 10


def measure_ms(work: Work) -> float:
    """Milliseconds of a work on the GPU, its cache emptied before: in a forward, weights come from memory."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=_MEASURE_MS, rep=_MEASURE_MS, return_mode="median"))


def import_kernels() -> Any:
    """The module of the kernels, which needs Triton."""
    from vmap_ensemble.execution.cuda import few_rows_kernels

    return few_rows_kernels


class FewRows:
    """Every member's linear layer or layer norm, on few rows, by whichever kernel was measured faster.

    Args:
        known: What an earlier start chose: `choices` of then.
        measure: A work -> its milliseconds on the device.
        load: Imports the kernels.

    Attributes:
        choices: Layer -> the name of the kernel that serves it, for JSON.
        choosing: Whether a layer that isn't known yet is measured, which waits for the device and for a compiler;
            else torch's kernels serve it.
        refused: Why torch's kernels serve all layers; None where Triton's run.
    """

    def __init__(
        self,
        known: Mapping[str, str] | None = None,
        measure: Callable[[Work], float] = measure_ms,
        load: Callable[[], Any] = import_kernels,
    ) -> None:
        self.choices: dict[str, str] = dict(known or {})
        self.choosing = True
        self.refused: str | None = None
        self._kernels, self._measure = None, measure
        try:
            self._kernels = load()
        except Exception as error:  # whatever importing Triton may raise on a machine that it isn't made for
            self._refuse(f"Triton can't be had: {type(error).__name__}: {first_line(error)}")

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str
    ) -> Tensor:
        """A linear layer with a residual and an activation.

        Args:
            x: (M, R, in).
            weight: (M, out, in).
            bias: (M, out) or None.
            other: The residual, (M, R, out), or None.
            activation: One of `LINEAR_ACTIVATIONS`.

        Returns:
            (M, R, out).
        """

        def plain() -> Tensor:
            y = multiply_members(x, weight, bias)
            return LINEAR_ACTIVATIONS[activation](y if other is None else y + other)

        kernels = self._kernels_for(
            x.shape[1], *(tensor for tensor in (x, weight, bias, other) if tensor is not None)
        )
        if kernels is None:
            return plain()
        members, outputs, inputs = weight.shape
        behind = "residual" if other is not None else activation
        key = f"{members} x {kernels.block_of(x.shape[1])} rows, {inputs} to {outputs}, {behind}, {_name(x)}"
        rivals = {
            f"triton {tile.outputs}x{tile.inputs}": partial(
                kernels.multiply, x, weight, bias, other, activation, tile
            )
            for tile in kernels.TILES
        }
        return self._run(key, plain, rivals)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """A layer norm over the last axis: (M, R, H), (M, H) and (M, H) -> (M, R, H)."""

        def plain() -> Tensor:
            y = F.layer_norm(x, x.shape[-1:], eps=eps)
            return torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1))

        kernels = self._kernels_for(x.shape[1], x, weight, bias)
        if kernels is None:
            return plain()
        key = f"{len(x)} x {kernels.block_of(x.shape[1])} rows of {x.shape[-1]}, layer norm, {_name(x)}"
        return self._run(key, plain, {"triton": partial(kernels.normalise, x, weight, bias, eps)})

    def _kernels_for(self, rows: int, *tensors: Tensor) -> Any:
        """The kernels, if they take the tensors: one floating dtype, and the last axis side by side; else None."""
        if self._kernels is None or rows > self._kernels.MOST_ROWS:
            return None
        kind = tensors[0].dtype
        fit = kind in _DTYPES and all(tensor.dtype == kind and tensor.stride(-1) == 1 for tensor in tensors)
        return self._kernels if fit else None

    def _refuse(self, reason: str) -> None:
        self._kernels, self.refused = None, reason
        logger.warning("torch's kernels serve few rows: %s", reason)

    def _run(self, key: str, plain: Work, rivals: Mapping[str, Work]) -> Tensor:
        if key not in self.choices and self.choosing:
            self.choices[key] = self._choose(key, plain, rivals)
        return rivals.get(self.choices.get(key, PLAIN), plain)()

    def _choose(self, key: str, plain: Work, rivals: Mapping[str, Work]) -> str:
        """The fastest of what gives torch's numbers; torch's own for good where no kernel does."""
        expected = plain()
        times, reasons = {}, []
        for name, work in {PLAIN: plain, **rivals}.items():
            try:
                check_close(work(), expected)
                times[name] = self._measure(work)
            except Exception as error:  # whatever a compiler or a GPU that it doesn't know may raise
                reasons.append(f"{name}: {type(error).__name__}: {first_line(error)}")
        if len(times) < 2 or PLAIN not in times:
            self._refuse(f"{key}: {'; '.join(reasons)}")
            return PLAIN
        logger.info("few rows: %s: %s", key, ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in times.items()))
        return min(times, key=lambda name: times[name])


def check_close(got: Tensor, expected: Tensor) -> None:
    """Hold a kernel's result against torch's, which rounds before a residual and an activation as well.

    Raises:
        LoadError: They differ by more than a layer may, relative to the largest number.
    """
    largest = float(expected.abs().max())
    bound = LAYER * default_tolerance(expected.dtype, expected.device) * max(1.0, largest)
    worst = float((got.float() - expected.float()).abs().max())
    if not worst <= bound:  # not a number is none, either
        raise LoadError(f"expected torch's result to {bound:.1e}, got one that is {worst:.1e} away")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
