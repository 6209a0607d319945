"""Turns a Hugging Face encoder and its stacked members into the fastest forward that it permits."""

from __future__ import annotations

import logging

from torch import Tensor, nn
from transformers import PreTrainedModel

from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.batching_rules import FastRules
from vmap_ensemble.encoders.forward import POSITIONS, EncoderForward, PackedEncoderForward
from vmap_ensemble.encoders.prepared import PreparedEncoder

logger = logging.getLogger(__name__)


def build_encoder_forward(model: PreTrainedModel, members: StackedMembers) -> EncoderForward:
    """Build the fastest vmapped forward that the architecture permits, and say so where it can't be packed.

    Args:
        model: An encoder with any head, in eval mode.
        members: Its stacked members.
    """
    rules = FastRules(linear_weights(model, members))
    if model.config.model_type in POSITIONS:
        return PackedEncoderForward(model, members, rules, prepare=PreparedEncoder)
    name = model.config.model_type
    logger.warning("padding of '%s' can't be removed: it is padded to the longest text", name)
    return EncoderForward(model, members, rules)


def linear_weights(model: nn.Module, members: StackedMembers) -> dict[str, Tensor]:
    """Key -> the members' (M, out, in) or shared (out, in) weights of the model's linear layers."""
    tensors = {**members.shared, **members.stacked}
    keys = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {key: tensors[key] for key in keys if key in tensors}
