"""Turns a Hugging Face encoder and its stacked members into one vmapped forward, without padding where it can.

(B, S) ids and mask -> (1, T) ids and positions, T real tokens -> encoder -> (1, T, H) -> head -> (M, B, ...)
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.attention import ATTENTION, packed
from vmap_ensemble.encoders.batching_rules import FastRules
from vmap_ensemble.encoders.fused import FusedEncoder, Kernels
from vmap_ensemble.encoders.packing import Packing, pack, spread, take_first, unpack
from vmap_ensemble.encoders.recorded import PackedTexts, PaddedTexts, round_up
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.onednn import prepack
from vmap_ensemble.execution.cuda.graphs import LayOut
from vmap_ensemble.execution.cuda.varlen import has_varlen

logger = logging.getLogger(__name__)

Positions = Callable[[Tensor, int], Tensor]


def count_columns(input_ids: Tensor, _padding_id: int) -> Tensor:
    """Position ids of BERT: the column. (B, S) -> (B, S)."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def count_real_tokens(input_ids: Tensor, padding_id: int) -> Tensor:
    """Position ids of RoBERTa: counted over what isn't the padding token, from padding_id + 1. (B, S) -> (B, S)."""
    real = input_ids.ne(padding_id)
    return real.cumsum(1) * real + padding_id


# Encoders that ask the AttentionInterface and take position_ids; the others are padded to the longest text.
POSITIONS: dict[str, Positions] = {
    "bert": count_columns,
    "distilbert": count_columns,
    "electra": count_columns,
    "roberta": count_real_tokens,
    "xlm-roberta": count_real_tokens,
    "camembert": count_real_tokens,
}
_FIRST_TOKEN_HEADS = frozenset(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_TOKEN_HEADS = frozenset(
    name
    for mapping in (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    for name in mapping.values()
)


class EncoderForward(EnsembleForward):
    """The vmapped forward of a Hugging Face encoder, cut to the longest text of the batch.

    Arguments of a call: input_ids (B, S), attention_mask (B, S), token_type_ids (B, S) or None, wherever they are: on
    the host they can be laid out without waiting for a GPU. Outputs as the model's own, each tensor (M, B, ...);
    those per token may be shorter than S. `loop` is the plain loop over S.

    Args:
        model: An encoder with any head, in eval mode.
        members: Its stacked members.
        rules: Batching rules that the model's code runs under; by default vmap's own.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, members: StackedMembers, rules: FastRules | None = None) -> None:
        super().__init__(model, members)
        self.per_token = type(model).__name__ in _TOKEN_HEADS
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._use_rules(rules)

    def _use_rules(self, rules: FastRules | None) -> None:
        self.fast_rules = rules
        self.rules = nullcontext if rules is None else lambda: rules

    @property
    def one_vmap(self) -> None:
        """None: arguments are cut, or packed, and get names."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return self.members.device

    @property
    def padding_id(self) -> int:
        """The token that stands where there is none."""
        return int(self.model.config.pad_token_id or 0)

    def widen(self, width: int) -> int:
        """The width itself: who knows what an architecture makes of padding."""
        return width

    @property
    def static_batches(self) -> Callable[[Callable[..., Any], Sequence[int] | None], PaddedTexts]:
        """Texts as long as the longest."""
        return partial(PaddedTexts, self)

    @property
    def static_forward(self) -> Callable[[Sequence[int] | None], LayOut]:
        """The same, since finding the longest waits for it."""
        return partial(PaddedTexts, self, lambda ids, mask, types=None: self._run(ids, mask, types, None))

    def without_packed_weights(self) -> EncoderForward:
        """The same under rules that keep no reordered matrices."""
        if self.fast_rules is None:
            return self
        plain = copy.copy(self)
        plain._use_rules(FastRules())
        return plain

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts in one vmapped call; see the class."""
        width = int(attention_mask.bool().any(0).nonzero().max()) + 1
        cut = (None if t is None else t[:, :width] for t in (input_ids, attention_mask, token_type_ids))
        return self._run(*self._place(*cut), None)

    def _run(self, *inputs: Tensor | None) -> Any:
        in_dims = (0, 0, None, *(None for _ in inputs))
        with self.rules():
            return vmap(self._member, in_dims=in_dims)(self._index, self._own, self.members.shared, *inputs)

    def _place(self, *args: Tensor | None) -> list[Tensor | None]:
        """On the members' device: arguments may be on the host, where they can be looked at without a wait."""
        return [None if arg is None else arg.to(self.device, non_blocking=True) for arg in args]

    # vmap maps positional arguments only, and each architecture orders its own differently: they get names here.
    def _member(self, _index: Tensor, own: dict[str, Tensor], shared: dict[str, Tensor], *inputs: Any) -> Any:
        keywords = self._name_inputs(*inputs)
        return functional_call(self.model, self._join_ties({**shared, **own}), (), keywords)

    def bind(self, *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Named, since each architecture orders its own differently."""
        return (), self._name_inputs(*self._place(*args))  # type: ignore[arg-type]

    def argument_names(self, args: Sequence[Any]) -> list[str]:
        """The model's own names."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return [name for name, arg in zip(names, args, strict=False) if isinstance(arg, Tensor)]

    def plain_model(self) -> PreTrainedModel:
        """With an attention that every exporter knows."""
        model = copy.deepcopy(self.model)
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        return model

    def _name_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What there is of the inputs that the model takes: FNet, for one, has no mask."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return {name: tensor for name, tensor in inputs.items() if tensor is not None and name in self._takes}

    def comparable(self, outputs: Any, args: tuple[Any, ...], batch_axis: int) -> Any:
        """Outputs up to the longest text, zero at padding, of which nobody asks anything."""
        mask = args[1].bool()
        longest = int(mask.any(0).nonzero().max()) + 1
        sizes = (mask.shape[1], longest)

        def clear(tensor: Tensor) -> Tensor:
            per_token = tensor.dim() > batch_axis + 1 and tensor.shape[batch_axis] == len(mask)
            if not per_token or tensor.shape[batch_axis + 1] not in sizes:
                return tensor
            rest = tensor.dim() - batch_axis - 2
            real = mask[:, :longest].reshape(len(mask), longest, *[1] * rest).to(tensor.device)
            return torch.where(real, tensor.narrow(batch_axis + 1, 0, longest), 0.0)

        return pytree.tree_map(clear, outputs)


class PackedEncoderForward(EncoderForward):
    """The vmapped forward of a Hugging Face encoder that computes no padding.

    Called like `EncoderForward`; outputs per token are (M, B, S, ...), zero at padding.

    Args:
        model: An encoder with any head, in eval mode; its attention implementation is replaced.
        members: Its stacked members.
        rules: As for `EncoderForward`; by default rules without packed weights.
        prepare: This forward and an example of its arguments -> its preparation for the mode `prepared`.

    Raises:
        LoadError: The architecture isn't one of `POSITIONS`, or its base model has no encoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        members: StackedMembers,
        rules: FastRules | None = None,
        prepare: Callable[[PackedEncoderForward, tuple[Any, ...]], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__(model, members, FastRules() if rules is None else rules)
        kind = model.config.model_type
        if kind not in POSITIONS:
            raise LoadError(f"padding of '{kind}' can't be removed; expected one of {', '.join(POSITIONS)}")
        self._prepare = prepare
        self._positions = POSITIONS[kind]
        self._encoder = find_encoder(model)
        self._first_only = type(model).__name__ in _FIRST_TOKEN_HEADS
        model.set_attn_implementation(ATTENTION)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts in one vmapped call; see the class."""
        args = self._place(input_ids, attention_mask, token_type_ids)
        packing = pack(attention_mask, self.device)
        ids, types, places = self.pack_rows(packing, args[0], args[2])  # type: ignore[arg-type]
        return self.unpack_outputs(self.run_packed(packing, ids, types, places), packing)

    def pack_rows(
        self, packing: Packing, input_ids: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, token types and position ids of the real tokens: (B, S) each -> (1, T)."""
        positions = self.count_positions(input_ids)
        ids, places = (t.reshape(-1)[packing.index].unsqueeze(0) for t in (input_ids, positions))
        types = None if token_type_ids is None else token_type_ids.reshape(-1)[packing.index].unsqueeze(0)
        return ids, types, places

    def count_positions(self, input_ids: Tensor) -> Tensor:
        """Position ids of padded ids, as the architecture counts them: (B, S) -> (B, S)."""
        return self._positions(input_ids, self.padding_id)

    @property
    def longest(self) -> int:
        """The longest text in tokens that every architecture of `POSITIONS` has positions for."""
        return int(self.model.config.max_position_embeddings) - self.padding_id - 1

    def packed_weights(self, weight: Tensor) -> list[Tensor]:
        """Matrices of (M, out, in) or (out, in) weights in oneDNN's order; the rules' own where they have them."""
        kept = None if self.fast_rules is None else self.fast_rules.prepacked(weight, 1, needs_grad=False)
        return prepack(weight) if kept is None else kept

    def widen(self, width: int) -> int:
        """A bucket: masks keep padding out of these architectures' answers."""
        return max(width, min(round_up(width), self.longest))

    @property
    def needs_width(self) -> bool:
        """Whether the part behind the packing lays tokens out in rows: heads on whole texts, and attention may."""
        dtype = next(t.dtype for t in self.members.tensors() if t.is_floating_point())
        return not (self.per_token or self._first_only) or not has_varlen(self.device, dtype)

    @property
    def static_forward(self) -> Callable[[Sequence[int] | None], LayOut]:
        """Without padding; what fills a bucket is one more text."""
        return partial(PackedTexts, self)

    @property
    def static_fused(self) -> Callable[[Kernels, Sequence[Any], Sequence[int] | None], LayOut]:
        """As `static_forward`, in fused steps; see fused.py. Batches that token types set apart run as they are."""
        return self._lay_out_fused

    def _lay_out_fused(self, kernels: Kernels, example: Sequence[Any], buckets: Sequence[int] | None) -> LayOut:
        fused = FusedEncoder(self, len(example) > 2 and example[2] is not None, kernels)

        def run(packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor) -> Any:
            as_traced = (types is not None) == fused.with_types
            return (fused if as_traced else self.run_packed)(packing, ids, types, places)

        return PackedTexts(self, buckets, run)

    def run_packed(self, packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor) -> Any:
        """Run all members on what `pack_rows` gives; outputs per token stay packed."""
        with packed(packing), self._unpacking(packing):
            return self._run(ids, None, types, places)

    def run_state(
        self, state: dict[str, Tensor], packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor
    ) -> Any:
        """Run a member's state dict on what `pack_rows` gives; outputs per token stay packed."""
        with packed(packing), self._unpacking(packing):
            return functional_call(self.model, state, (), self._name_inputs(ids, None, types, places))

    def unpack_outputs(self, outputs: Any, packing: Packing) -> Any:
        """Outputs per token of a packed row, (M, 1, T, ...) -> (M, B, S, ...); others stay as they are."""
        if not self.per_token:
            return outputs
        return pytree.tree_map(lambda t: spread(t.squeeze(1), 1, packing), outputs)

    @property
    def preparation(self) -> Callable[[tuple[Any, ...]], Callable[..., Any]] | None:
        """What was given as `prepare`, for this forward."""
        return None if self._prepare is None else partial(self._prepare, self)

    @contextmanager
    def _unpacking(self, packing: Packing) -> Iterator[None]:
        """Within it the encoder hands its head what the head expects: a batch."""
        if self.per_token:
            yield  # such a head treats every token alike, so it runs on the packed row
            return
        turn = take_first if self._first_only else unpack

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            output.last_hidden_state = turn(output.last_hidden_state, packing)
            return output

        handle = self._encoder.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def find_encoder(model: PreTrainedModel) -> nn.Module:
    """The submodule that holds the base model's layers.

    Raises:
        LoadError: There is none.
    """
    for name in ("encoder", "transformer"):
        encoder = getattr(model.base_model, name, None)
        if isinstance(encoder, nn.Module):
            return encoder
    where = f"'encoder' or 'transformer' in its {type(model.base_model).__name__}"
    raise LoadError(f"{type(model).__name__}: expected the layers under {where}, found neither")
