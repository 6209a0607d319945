"""Turns one text and a score of the ensemble into what each token adds to it: layer integrated gradients.

    F(x) = sum_m w_m F_m(x)                     the members' scores, added up as the ensemble adds them
    A[t] = sum_m w_m IG_m[t]                    integrated gradients are linear, so members go one by one
    sum_t A[t] = F(x) - F(baseline) + delta     delta is what the numerical integral misses

The path goes through each member's own embeddings, from those of the baseline to those of the text. Gradients are
taken of the member's plain forward on views of the stack: neither the stack nor the model is copied.

Source: Sundararajan et al. 2017 (integrated gradients); Captum's LayerIntegratedGradients does the integral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vmap_ensemble.encoders.forward import POSITIONS, EncoderForward, Positions, count_real_tokens
from vmap_ensemble.errors import NotOffered, SettingsError

Score = Callable[[Any], Tensor]

# MPNet counts over what isn't token 1, whatever its config calls the padding token.
_POSITIONS: dict[str, Positions] = {**POSITIONS, "mpnet": lambda ids, _padding: count_real_tokens(ids, 1)}


@dataclass(frozen=True)
class EncodedText:
    """One text as a member reads it, and the baseline that it is compared with.

    Attributes:
        input_ids: (1, S) int64.
        baseline_ids: (1, S) int64: the same special tokens, padding tokens for all others.
        attention_mask: (1, S), ones: the baseline is as long as the text.
        token_type_ids: (1, S), or None.
    """

    input_ids: Tensor
    baseline_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None = None


@dataclass(frozen=True)
class Attribution:
    """What one member's tokens add to one score.

    Attributes:
        tokens: (S,) float32; their sum is value - baseline + delta.
        value: The score of the text.
        baseline: The score of the baseline.
        delta: What the numerical integral misses.
    """

    tokens: Tensor
    value: float
    baseline: float
    delta: float


class MemberAttribution:
    """Layer integrated gradients of any score of one member of a stack.

    Args:
        forward: The members.
        layer: The module whose output the path leads through: the embeddings.
        steps: Points of the integral.
        batch_size: Points that are computed at once; bounds the memory.
    """

    def __init__(self, forward: EncoderForward, layer: nn.Module, steps: int, batch_size: int) -> None:
        self.forward, self.layer, self.steps, self.batch_size = forward, layer, steps, batch_size
        self.device = next(iter(forward.member_state(0).values())).device
        config = forward.model.config
        self._positions = _POSITIONS.get(config.model_type)
        self._padding_id = int(config.pad_token_id or 0)

    @torch.inference_mode()
    def ends(self, member: int, text: EncodedText, score: Score) -> tuple[float, float]:
        """The score of the text and of its baseline."""
        both = torch.cat((text.input_ids, text.baseline_ids))
        values = self._score(member, score)(both, *(_twice(tensor) for tensor in self._others(text)))
        return values[0].item(), values[1].item()

    def __call__(self, member: int, text: EncodedText, score: Score) -> Attribution:
        """Attribute one score of one member to the tokens.

        Args:
            member: Its number in the stack.
            text: What the member reads.
            score: The member's outputs, tensors (K, ...), to (K,): what is explained.

        Raises:
            ItemError: where Captum isn't installed.
        """
        integrate = import_captum()(self._score(member, score), self.layer)
        value, baseline = self.ends(member, text, score)
        with torch.inference_mode(False), torch.enable_grad():
            embeddings = integrate.attribute(
                text.input_ids,
                baselines=text.baseline_ids,
                additional_forward_args=self._others(text),
                n_steps=self.steps,
                internal_batch_size=self.batch_size,
            )
        tokens = embeddings[0].float().sum(-1).detach()
        return Attribution(tokens, value, baseline, tokens.sum().item() - (value - baseline))

    def _others(self, text: EncodedText) -> tuple[Tensor | None, ...]:
        # The text's positions for the baseline as well: RoBERTa gives padding a position of its own.
        ids = text.input_ids
        places = None if self._positions is None else self._positions(ids, self._padding_id)
        return text.attention_mask, text.token_type_ids, places

    def _score(self, member: int, score: Score) -> Callable[..., Tensor]:
        return lambda *inputs: score(self.forward.member(member, *inputs)).float()


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.expand(2, -1)


def find_embeddings(model: Any, name: str) -> nn.Module:
    """The module whose output is a text's embeddings.

    Args:
        model: An encoder of transformers with any head.
        name: The settings' embedding_name: a module, or one that holds `embeddings` as TorchServe's example has
            it (`bert`); the base model's `embeddings` when empty.

    Raises:
        SettingsError: There is no such module.
    """
    if not name:
        found = getattr(model.base_model, "embeddings", None)
        if not isinstance(found, nn.Module):
            kind = type(model.base_model).__name__
            raise SettingsError(
                f"setup_config.json: embedding_name: {kind} has no module 'embeddings'; name the one that it has"
            )
        return found
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise SettingsError(
            f"setup_config.json: embedding_name: {type(model).__name__} has no module '{name}'; expected "
            f"'{model.base_model_prefix}', another module that embeds, or nothing"
        ) from None
    inner = getattr(module, "embeddings", None)
    return inner if isinstance(inner, nn.Module) else module


def import_captum() -> Any:
    """Captum's LayerIntegratedGradients, imported only once somebody asks for an explanation.

    Raises:
        ItemError: 501, Captum isn't installed.
    """
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError:
        raise NotOffered(
            "explanations need captum, which this server lacks; there: pip install -r requirements-bert.txt"
        ) from None
    return LayerIntegratedGradients
