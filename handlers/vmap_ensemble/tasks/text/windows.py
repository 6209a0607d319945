"""Turns what a tokenizer gives into windows of tokens, with the characters that each token stands for."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vmap_ensemble.tasks.text.inputs import TextInput

# Names of transformers' tables of learned positions.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


@dataclass(frozen=True)
class Window:
    """One sequence of tokens.

    Attributes:
        arrays: Model input name -> ids of one sequence without padding.
        offsets: Per token, the characters (start, end) it stands for in its own text, without spaces around them.
        sequence_ids: Per token 0 for the first text, 1 for the second, None for special tokens.
        word_ids: Per token the number of its word, None for special tokens.
    """

    arrays: dict[str, list[int]]
    offsets: list[tuple[int, int]]
    sequence_ids: list[int | None]
    word_ids: list[int | None]

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True)
class TextExample:
    """One item: what was read, and the windows of it.

    Attributes:
        text: What was read.
        windows: Its sequences of tokens; several only for a long text.
        truncated: Whether tokens of the text were cut off.
        overlap: Tokens that neighbouring windows share.
    """

    text: TextInput
    windows: list[Window] = field(default_factory=list)
    truncated: bool = False
    overlap: int = 0

    @property
    def tokens(self) -> int:
        """Tokens over all windows: what the item costs."""
        return sum(map(len, self.windows))


def window_of(encoded: Any, index: int, text: TextInput) -> Window:
    """One sequence of a tokenizer's result; a single text's fields are not nested."""
    encoding = encoded.encodings[index]
    own = encoded["input_ids"] and isinstance(encoded["input_ids"][0], list)
    skipped = ("offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask")
    arrays = {key: (value[index] if own else value) for key, value in encoded.items() if key not in skipped}
    sequence_ids = list(encoding.sequence_ids)
    texts = (text.text, text.pair or "")
    # Byte-level BPE and sentencepiece count the space before a word among its first token.
    offsets = [
        span if part is None else trim(texts[part], *span)
        for part, span in zip(sequence_ids, encoding.offsets, strict=True)
    ]
    return Window(arrays, offsets, sequence_ids, list(encoding.word_ids))


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """A stretch of a text without the spaces around it; one of spaces alone is empty, behind them."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def is_punctuation(text: str) -> bool:
    """Whether there are only marks and symbols in a text; vowel signs, which aren't letters either, are none."""
    return all(unicodedata.category(character)[0] in "PS" for character in text)


def positions_of(model: nn.Module) -> int | None:
    """Longest sequence that a model has learned positions for; None where it has no such table.

    Positions behind a padding index begin after it: RoBERTa's 514 rows are for 512 tokens.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            # BART's kin leave rows out without a padding index.
            return int(module.num_embeddings) - max(unused, int(getattr(module, "offset", 0)))
    return None


def vocabulary_of(model: Any) -> int | None:
    """Number of tokens that a model has embeddings for; None where it doesn't say."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def agree_on_padding(tokenizer: Any, config: Any) -> int:
    """The token that texts are filled up with, which the model knows as its padding from now on.

    Heads of decoders read the last token that isn't padding, by the id in the model's config, whatever the tokenizer
    fills with. A config without one takes the tokenizer's, or a special token that no text ends with.

    Args:
        tokenizer: Of the members.
        config: The model's own, changed where it names no padding token.
    """
    own = config.get_text_config()
    if own.pad_token_id is not None and own.pad_token_id >= 0:
        return int(own.pad_token_id)
    ends = set(tokenizer("a")["input_ids"][-1:])
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids]
    found = next((number for number in known if number is not None and number not in ends), None)
    if found is not None:
        own.pad_token_id = found
    return int(found or 0)
