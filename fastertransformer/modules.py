"""Turns a Hugging Face BERT in eval mode into a module for TorchScript whose layers are the library's class.

A traced file names nothing but torch.classes.FasterTransformer.Encoder and fastertransformer::rebuild_padding. R rows
are the tokens that are computed: the real ones (T) with padding removed, all B * S without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Logit of a padded position in question answering: below any real one and finite in fp16.
PADDING_LOGIT = -10000.0


def list_layer_tensors(layer: Any) -> list[Tensor]:
    """Return the 17 tensors of one BERT layer in the order of the class's constructor; kernels are (in, out)."""
    attention = layer.attention
    own = attention.self
    tensors: list[Tensor] = []
    for linear in (own.query, own.key, own.value, attention.output.dense):
        tensors += [linear.weight.t(), linear.bias]
    tensors += [attention.output.LayerNorm.weight, attention.output.LayerNorm.bias]
    for linear in (layer.intermediate.dense, layer.output.dense):
        tensors += [linear.weight.t(), linear.bias]
    tensors += [layer.output.LayerNorm.weight, layer.output.LayerNorm.bias]
    amax_list = torch.zeros(1, device=own.query.weight.device)  # ranges for int8, which mode 0 doesn't read
    return [tensor.detach().contiguous() for tensor in tensors] + [amax_list]


class Embeddings(nn.Module):
    """Ids, positions and token types of R rows -> (R, H)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.word: Tensor
        self.register_buffer("word", source.word_embeddings.weight.detach())
        self.position: Tensor
        self.register_buffer("position", source.position_embeddings.weight.detach())
        self.token_type: Tensor
        self.register_buffer("token_type", source.token_type_embeddings.weight.detach())
        self.norm = source.LayerNorm

    def forward(self, ids: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        rows = F.embedding(ids, self.word)
        if token_types is None:  # noqa: SIM108 (one branch a line reads better in TorchScript)
            rows = rows + self.token_type[0]
        else:
            rows = rows + F.embedding(token_types, self.token_type)
        return self.norm(rows + F.embedding(positions, self.position))


class FasterLayer(nn.Module):
    """One encoder layer: the library's class as an attribute, so that TorchScript saves it with its tensors."""

    def __init__(self, layer: Any, index: int, count: int, remove_padding: bool) -> None:
        super().__init__()
        own = layer.attention.self
        self.encoder = torch.classes.FasterTransformer.Encoder(
            *list_layer_tensors(layer), own.num_attention_heads, own.attention_head_size, remove_padding,
            0, count, index, False,
            # use_trt_kernel: padding that is kept may be anywhere, which the mask says and the offsets can't.
            remove_padding,
        )  # fmt: skip

    def forward(self, hidden: Tensor, mask: Tensor, offsets: Tensor, sequence_id_offset: Tensor) -> Tensor:
        return self.encoder.forward(hidden, mask, offsets, sequence_id_offset)


class PlainLayer(nn.Module):
    """The same layer in plain torch (model type `ths`): needs no library, removes no padding."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.attention.self
        self.heads: int = own.num_attention_heads
        self.size: int = own.attention_head_size
        self.query, self.key, self.value = own.query, own.key, own.value
        self.attention_output, self.attention_norm = layer.attention.output.dense, layer.attention.output.LayerNorm
        self.intermediate, self.output, self.norm = (
            layer.intermediate.dense,
            layer.output.dense,
            layer.output.LayerNorm,
        )

    def split(self, rows: Tensor) -> Tensor:
        """(B, S, H) -> (B, heads, S, size)."""
        return rows.view(rows.size(0), rows.size(1), self.heads, self.size).transpose(1, 2)

    def forward(self, hidden: Tensor, mask: Tensor, offsets: Tensor, sequence_id_offset: Tensor) -> Tensor:
        query, key, value = (
            self.split(self.query(hidden)),
            self.split(self.key(hidden)),
            self.split(self.value(hidden)),
        )
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask > 0)
        context = context.transpose(1, 2).reshape(hidden.shape)
        attended = self.attention_norm(self.attention_output(context) + hidden)
        return self.norm(self.output(F.gelu(self.intermediate(attended))) + attended)


def check_inputs(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None, max_length: int) -> None:
    """Refuse inputs of unlike shapes, whose rows would be mixed up in silence, and longer ones than were traced."""
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"expected input_ids and attention_mask of one shape (batch, length), got {input_ids.shape} and "
            f"{attention_mask.shape}"
        )
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(f"token_type_ids: expected shape {input_ids.shape}, got {token_type_ids.shape}")
    if input_ids.size(1) > max_length:
        raise ValueError(f"input_ids of length {input_ids.size(1)}: this file was traced for at most {max_length}")


class PackedCore(nn.Module):
    """Ids and mask (B, S) -> rows of the real tokens (T, H). Padding goes before the embedding, not after it.

    The mask may have holes or padding on the left: rows keep their positions, as in Hugging Face.
    """

    def __init__(self, embeddings: nn.Module, layers: Sequence[nn.Module], max_length: int) -> None:
        super().__init__()
        self.embeddings, self.layers, self.max_length = embeddings, nn.ModuleList(layers), max_length

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_inputs(input_ids, attention_mask, token_type_ids, self.max_length)
        batch, length = input_ids.size(0), input_ids.size(1)
        kept = attention_mask != 0
        lengths = kept.sum(1).to(torch.int32)
        offsets = F.pad(torch.cumsum(lengths, 0).to(torch.int32), [1, 0])
        places = kept.flatten().nonzero().squeeze(1)
        token_types = token_type_ids
        if token_types is not None:
            token_types = token_types.flatten().index_select(0, places)
        hidden = self.embeddings(input_ids.flatten().index_select(0, places), places % length, token_types)
        sequence_id_offset = (places - torch.arange(places.size(0), device=places.device)).to(torch.int32)
        # With padding removed only the mask's shape is read, so one row per sequence stands for all.
        mask = kept.to(hidden.dtype).view(batch, 1, 1, length).expand(batch, 1, length, length)
        for layer in self.layers:
            hidden = layer(hidden, mask, offsets, sequence_id_offset)
        return hidden, offsets[:-1], sequence_id_offset, mask

    def spread(self, rows: Tensor, sequence_id_offset: Tensor, mask: Tensor) -> Tensor:
        """(T, C) -> (B, S, C), zero where padding was."""
        return torch.ops.fastertransformer.rebuild_padding(rows, sequence_id_offset, mask, 0)


class PaddedCore(nn.Module):
    """Ids and mask (B, S) -> all rows (B * S, H)."""

    def __init__(self, embeddings: nn.Module, layers: Sequence[nn.Module], max_length: int) -> None:
        super().__init__()
        self.embeddings, self.layers, self.max_length = embeddings, nn.ModuleList(layers), max_length

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_inputs(input_ids, attention_mask, token_type_ids, self.max_length)
        batch, length = input_ids.size(0), input_ids.size(1)
        kept = attention_mask != 0
        starts = torch.arange(batch + 1, device=input_ids.device) * length
        # Valid and padded spans alternate: start, end of the real tokens, next start, ...
        ends = torch.stack([starts[:-1], starts[:-1] + kept.sum(1)], 1).flatten()
        offsets = torch.cat([ends, starts[-1:]]).to(torch.int32)
        positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        hidden = self.embeddings(input_ids, positions, token_type_ids)
        mask = kept.to(hidden.dtype).view(batch, 1, 1, length).expand(batch, 1, length, length)
        for layer in self.layers:
            hidden = layer(hidden, mask, offsets, offsets)
        return hidden.view(batch * length, hidden.size(2)), starts[:-1], offsets, mask

    def spread(self, rows: Tensor, sequence_id_offset: Tensor, mask: Tensor) -> Tensor:
        """(B * S, C) -> (B, S, C)."""
        return rows.view(mask.size(0), mask.size(3), rows.size(1))


class SequenceClassifier(nn.Module):
    """(input_ids, attention_mask) -> logits (B, C), from each text's first token.

    That is position 0, as in Hugging Face; where padding is removed it is the first real one, if that differs.
    """

    def __init__(self, core: Any, model: Any) -> None:
        super().__init__()
        self.core, self.pooler, self.classifier = core, model.bert.pooler.dense, model.classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        rows, first, _, _ = self.core(input_ids, attention_mask, token_type_ids)
        if not bool((attention_mask != 0).any(1).all()):  # its first row would be its neighbour's
            raise ValueError("attention_mask: a text without any token has nothing to classify")
        return self.classifier(torch.tanh(self.pooler(rows.index_select(0, first))))


class TokenClassifier(nn.Module):
    """(input_ids, attention_mask) -> logits (B, S, C), zero where padding was removed."""

    def __init__(self, core: Any, model: Any) -> None:
        super().__init__()
        self.core, self.classifier = core, model.classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        rows, _, sequence_id_offset, mask = self.core(input_ids, attention_mask, token_type_ids)
        return self.core.spread(self.classifier(rows), sequence_id_offset, mask)


class QuestionAnswerer(nn.Module):
    """(input_ids, attention_mask) -> start and end logits, (B, S) each; padding gets PADDING_LOGIT."""

    def __init__(self, core: Any, model: Any) -> None:
        super().__init__()
        self.core, self.outputs, self.padding_logit = core, model.qa_outputs, PADDING_LOGIT

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, _, sequence_id_offset, mask = self.core(input_ids, attention_mask, token_type_ids)
        logits = self.core.spread(self.outputs(rows), sequence_id_offset, mask)
        # 0 would win an arg max over positions whose real logits are all negative.
        logits = logits.masked_fill((attention_mask == 0).unsqueeze(2), self.padding_logit)
        return logits[:, :, 0].contiguous(), logits[:, :, 1].contiguous()


HEADS: dict[str, type[nn.Module]] = {
    "sequence_classification": SequenceClassifier,
    "question_answering": QuestionAnswerer,
    "token_classification": TokenClassifier,
}


def convert_model(
    model: Any, mode: str, max_length: int, *, remove_padding: bool = True, plain: bool = False
) -> nn.Module:
    """Rebuild a Hugging Face BERT from its own weights around the library's encoder layers.

    Args:
        model: BertForSequenceClassification, BertForQuestionAnswering or BertForTokenClassification in eval mode, on
            the device and in the dtype to trace.
        mode: One of HEADS.
        max_length: Longest input accepted; at most the model's positions.
        remove_padding: Compute the real tokens alone.
        plain: Layers in plain torch instead of the library's class (padding stays).

    Returns:
        A module that torch.jit.script accepts; it shares the weights of `model` outside the encoder.
    """
    layers = model.bert.encoder.layer
    core: nn.Module
    if plain:
        core = PaddedCore(Embeddings(model.bert.embeddings), [PlainLayer(layer) for layer in layers], max_length)
    else:
        core_class = PackedCore if remove_padding else PaddedCore
        faster = [FasterLayer(layer, i, len(layers), remove_padding) for i, layer in enumerate(layers)]
        core = core_class(Embeddings(model.bert.embeddings), faster, max_length)
    return HEADS[mode](core, model).eval()
