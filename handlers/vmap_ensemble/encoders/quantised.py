"""Turns encoders' members into 8 bits, for a CPU, and into the plain loop on the same 8-bit numbers that proves them.

Weights have a scale per output, and rows of tokens one each, found when they come; embeddings, heads, norms, softmax
and activations stay float32. Nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.forward import PackedEncoderForward, find_encoder
from vmap_ensemble.encoders.prepared import INT8_TOLERANCE, PreparedEncoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.encoder_layers import round_rows, round_weight


class QuantisedEncoderForward(PackedEncoderForward):
    """The forward of all members with the products of their layers in 8 bits.

    Args:
        model: An encoder with any head, in eval mode.
        members: Its stacked members, float32 on a CPU.
        example: The model's arguments; tells whether it is called with token types.

    Raises:
        UnsupportedModel: The members are elsewhere or of another dtype, or the kernel doesn't take their layers.
        LoadError: The architecture isn't one whose padding can be removed.

    Note:
        `member`, the loop and explanations are those of the same 8-bit numbers in plain torch; gradients pass the
        rounding unchanged.
    """

    only_mode = "int8"  # float32 would give other answers
    tolerance = INT8_TOLERANCE

    def __init__(self, model: Any, members: StackedMembers, example: tuple[Any, ...]) -> None:
        super().__init__(model, members)
        own = set(find_encoder(model).modules())
        linears = [name for name, module in model.named_modules() if module in own and isinstance(module, nn.Linear)]
        self._rounded_keys = [f"{name}.weight" for name in linears]
        self._prepared = PreparedEncoder(self, example, int8=True)
        self.reason = f"{len(self._rounded_keys)} linear layers in 8 bits"

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts, as `PackedEncoderForward`; outputs (M, B, ...)."""
        return self._prepared(input_ids, attention_mask, token_type_ids)

    def member(self, index: int, *args: Any) -> Any:
        """Run one member alone, in plain torch on the same 8-bit numbers: outputs (B, ...)."""
        state = self.member_state(index)
        for key in self._rounded_keys:
            rounded, steps = round_weight(state[key])
            state[key] = rounded * steps.unsqueeze(-1)
        positional, named = self.bind(*args)
        with _RoundedRows({id(state[key]) for key in self._rounded_keys}):
            return torch.func.functional_call(self.model, state, positional, named)

    @property
    def size_bytes(self) -> int:
        """What the members' tensors take: a byte per rounded weight, and a scale and a sum per output."""
        tensors = {**self.members.shared, **self.members.stacked}
        spared = sum(3 * tensors[key].numel() - 8 * tensors[key][..., 0].numel() for key in self._rounded_keys)
        return self.members.size_bytes() - spared

    @property
    def preparation(self) -> None:
        """None: `__call__` is prepared."""
        return None

    def part(self, start: int, stop: int) -> Any:
        """The members from `start` to `stop`, exclusive, one after another: for when memory has run out."""
        return self.loop_part(start, stop)


class _RoundedRows(TorchFunctionMode):
    """Within it, linear layers of these weights (by id) round their rows to 8 bits."""

    def __init__(self, weights: Collection[int]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self._weights:
            x, *others = args
            args = (x + (round_rows(x) - x).detach(), *others)
        return func(*args, **(kwargs or {}))


def quantise_encoder(forward: Forward, example: tuple[Any, ...]) -> QuantisedEncoderForward:
    """The 8-bit form of a float32 forward of encoders.

    Args:
        forward: Of the members, float32 on a CPU; it isn't used afterwards.
        example: The model's arguments, (B, ...).

    Raises:
        LoadError: 8 bits can't be had for it.
    """
    if not isinstance(forward, PackedEncoderForward):
        raise LoadError("quantization int8: expected an encoder whose padding can be removed; leave it out")
    return QuantisedEncoderForward(forward.model, forward.members, example)
