"""Turns texts into padded batches for an encoder; what all text modes have in common.

A mode is a class of its own: it reads an item, says how it becomes token windows, and turns the members'
outputs into answers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmap_ensemble.core.aggregate import summands
from vmap_ensemble.errors import ItemError, NoAnswer, NotOffered, TooLargeItem, UnfitItem
from vmap_ensemble.tasks.answers import Answer, Options, significant
from vmap_ensemble.tasks.text.inputs import TextInput
from vmap_ensemble.tasks.text.settings import TextSettings
from vmap_ensemble.tasks.text.windows import TextExample, Window, window_of

# Tokens in all windows of a text, where the settings name no number of windows: about what a CPU computes in some
# seconds with the members of a base-sized encoder.
WINDOW_TOKENS = 2048
# Tokens beyond those kept of one text of a pair.
SPARE_TOKENS = 64


@dataclass(frozen=True)
class Target:
    """One thing that an answer says of a text and that can be explained.

    Attributes:
        row: What an explanation says of it, such as its label.
        score: Outputs of one member, tensors (K, ...), to the (K,) numbers that the ensemble adds up.
        window: The number of the window that it was found in.
    """

    row: dict[str, Any]
    score: Callable[[Any], Tensor]
    window: int = 0


class TextMode(ABC):
    """One thing that may be asked of a text.

    Args:
        settings: The archive's settings.
        tokenizer: A fast tokenizer of transformers.
        labels: Class number -> label.
        names: The members, in the order of the stack.
        positions: Longest sequence that the members have positions for (`positions_of`); None: any.
        vocabulary: Number of tokens that the members have embeddings for (`vocabulary_of`); None: all.
    """

    def __init__(
        self,
        settings: TextSettings,
        tokenizer: Any,
        labels: dict[int, str],
        names: Sequence[str],
        positions: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.labels, self.names = settings, tokenizer, labels, tuple(names)
        self.positions, self.vocabulary = positions, vocabulary

    @abstractmethod
    def read(self, item: Any) -> TextInput:
        """Check an item of a request."""

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Answer a batch; an answer to a text that was cut off says so.

        Args:
            outputs: Of all members, rows in the order of the windows.
            weights: (M, B), 0 for members outside an example's subset.
            options: One per example.
            examples: What `encode` returned.
        """
        answers = self.answer_batch(outputs, weights, options, examples)
        return [
            _finished(answer, example) if isinstance(answer, Answer) else answer
            for answer, example in zip(answers, examples, strict=True)
        ]

    @abstractmethod
    def answer_batch(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """Turn the outputs of all members, rows in the order of the windows, into one answer per example."""

    # Whether the answer is one of C classes, combined as `combine_classes` does.
    combines_classes: bool = False

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """The ensemble's probability of each class, (B, C), from the outputs of all members; weights are (M, B).

        Raises:
            NotOffered: The mode has no classes of a text.
        """
        raise NotOffered(f"mode '{self.settings.mode}' of these members has no probabilities of classes")

    # What a request calls the first and the second text.
    fields: tuple[str, str] = ("text", "text_pair")
    # A token that an explanation's baseline keeps; -1 is none.
    kept_token: int = -1

    @property
    def explains(self) -> str:
        """What explanations explain: probabilities, or their logarithms where those are what is averaged."""
        return "log_probability" if self.settings.aggregation == "mean_logit" else "probability"

    def summand(self, logits: Tensor) -> Tensor:
        """What a member adds to the ensemble's answer; (..., C) -> (..., C)."""
        return summands(logits, self.settings.aggregation, self.settings.temperature)

    def targets(self, outputs: Any, weights: Tensor, options: Options, example: TextExample) -> list[Target]:
        """What can be explained of one text; by default what the answer says.

        Args:
            outputs: Of all members, rows in the order of the example's windows.
            weights: (M, 1).
            options: Its `target` picks other things than the answer's.
            example: The text.

        Raises:
            ItemError: where the mode has nothing to explain, 422 for an unknown target.
        """
        raise NotOffered(f"mode '{self.settings.mode}' has nothing to explain")

    def parse(self, item: Any) -> TextExample:
        """Read and tokenise an item of a request, within what one may cost.

        Raises:
            ItemError: The item can't be read; 413 for more windows than a text may have.
        """
        example = self.encode(item)
        count = len(example.windows)
        if count > self.max_windows:
            raise TooLargeItem(
                f"the text has {count} windows of {self.max_length} tokens; at most {self.max_windows} are read at "
                "once: send it in parts",
            )
        return example

    def encode(self, item: Any) -> TextExample:
        """Read an item and tokenise it; what exceeds max_length is cut off."""
        text = self.read(item)
        short = self._shortened(text)
        encoded = self.tokenizer(
            short.text, short.pair, truncation=True, max_length=self.max_length, return_offsets_mapping=True
        )
        window = self.checked(window_of(encoded, 0, short))
        return TextExample(text, [window], short != text or bool(encoded.encodings[0].overflowing))

    def encode_windows(self, text: TextInput, truncation: bool | str, stride: int) -> TextExample:
        """Tokenise a text into windows of max_length that share `stride` tokens."""
        encoded = self.tokenizer(
            text.text,
            text.pair,
            truncation=truncation,
            max_length=self.max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = [self.checked(window_of(encoded, i, text)) for i in range(len(encoded["input_ids"]))]
        if self.tokenizer.truncation_side == "left":  # from the text's end to its beginning
            windows.reverse()
        return TextExample(text, windows, overlap=stride)

    @property
    def max_length(self) -> int:
        """Longest sequence: the settings', the tokenizer's or the members', whichever is least."""
        limits = (self.settings.max_length, int(self.tokenizer.model_max_length), self.positions)
        return min(limit for limit in limits if limit is not None)

    @property
    def max_windows(self) -> int:
        """Most windows of one text: the settings', or as many as hold WINDOW_TOKENS together."""
        return self.settings.max_windows or max(1, WINDOW_TOKENS // self.max_length)

    def checked(self, window: Window) -> Window:
        """A window all of whose tokens the members know.

        Raises:
            ItemError: for a token that was added to the tokenizer alone.
        """
        if self.vocabulary is not None and max(window.arrays["input_ids"], default=0) >= self.vocabulary:
            raise UnfitItem(
                f"the text holds a token of the tokenizer that the members lack: they have {self.vocabulary}",
            )
        return window

    def _shortened(self, text: TextInput) -> TextInput:
        """A pair of texts, each cut behind the tokens that could be kept.

        A tokenizer pairs every part that it cuts off the one text with every part of the other: two texts of 50,000
        characters took half a minute.
        """
        if text.pair is None or self.tokenizer.truncation_side == "left":
            return text
        return TextInput(self._beginning(text.text), self._beginning(text.pair))

    def _beginning(self, text: str) -> str:
        if len(text) <= self.max_length:
            return text
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # Some more than are kept: the tokens before the cut may be others.
        kept = self.max_length + SPARE_TOKENS
        return text if len(offsets) <= kept else text[: offsets[kept - 1][1]]

    def sample_items(self, count: int) -> list[Any]:
        """Items of different lengths to prove the forward on at load."""
        return [" ".join(["a sample text"] * (index % 4 + 1)) for index in range(count)]

    def picked_labels(self, wanted: Sequence[str | int] | None, count: int, default: list[int]) -> list[int]:
        """The classes that a client names by label or number.

        Args:
            wanted: Labels or numbers; `all`; None for the default.
            count: How many classes there are.
            default: Classes where none is wanted.

        Raises:
            ItemError: for a label that isn't there.
        """
        if wanted is None:
            return default
        numbers = {self.labels.get(index, str(index)): index for index in reversed(range(count))}
        if tuple(wanted) == ("all",) and "all" not in numbers:
            return list(range(count))
        picked = [numbers.get(str(name), as_number(name, count)) for name in wanted]
        for name, index in zip(wanted, picked, strict=True):
            if index is None:
                raise unknown_target(name, "a label, its number, or 'all'")
        return list(dict.fromkeys(index for index in picked if index is not None))

    def unusable(self) -> ItemError:
        """The reply where no member gave a finite output."""
        return NoAnswer("no member gave a finite output for this input")

    def answer_each(
        self,
        options: Sequence[Options],
        asked: Tensor,
        finite: Tensor,
        body_of: Callable[[int], dict[str, Any]],
        member_of: Callable[[int, int], dict[str, Any]],
    ) -> list[Answer | ItemError]:
        """One answer per example, from its own body and, where asked for, one row per member.

        Args:
            options: One per example.
            asked: (M, B) bool, members with a weight.
            finite: (M, B) bool, members whose output is finite.
            body_of: Number of the example -> its prediction and uncertainty.
            member_of: Numbers of member and example -> what that member says.
        """
        answers: list[Answer | ItemError] = []
        for b, option in enumerate(options):
            ensemble, left_out = self.ensemble_body(option, asked[:, b], finite[:, b])
            if not ensemble["used"]:
                answers.append(self.unusable())
                continue
            body = {**body_of(b), "ensemble": ensemble}
            if option.detail:
                used = (asked[:, b] & finite[:, b]).tolist()
                body["members"] = [{"name": name, **member_of(m, b)} for m, name in enumerate(self.names) if used[m]]
            answers.append(Answer(body, None, left_out))
        return answers

    def ensemble_body(
        self, options: Options, asked: Tensor, finite: Tensor
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The answer's part on the ensemble, and the members left out; asked and finite are (M,) bool."""
        used = int((asked & finite).sum())
        left_out = tuple(
            name for name, a, f in zip(self.names, asked.tolist(), finite.tolist(), strict=True) if a and not f
        )
        body: dict[str, Any] = {"size": len(self.names), "used": used}
        if options.subset is not None:
            body["subset"] = [name for name, a in zip(self.names, asked.tolist(), strict=True) if a]
        if left_out:
            body["left_out"] = list(left_out)
        return body, left_out


def _finished(answer: Answer, example: TextExample) -> Answer:
    """An answer whose numbers have the digits that mean something, and that says whether its text was cut off."""
    cut = {"truncated": True} if example.truncated else {}
    return dataclasses.replace(answer, body={**significant(answer.body), **cut})


def pad_windows(windows: Sequence[Window], names: Sequence[str], pad: dict[str, int]) -> tuple[Tensor, ...]:
    """Pad to the longest: one (B, S) int64 tensor per name, on the right.

    Args:
        windows: B sequences.
        names: Model inputs, in the order of the model's arguments.
        pad: Name -> padding value; 0 where there is none.
    """
    longest = max(len(window) for window in windows)
    tensors = []
    for name in names:
        fill = pad.get(name, 0)
        # Tokenizers of models without a mask give none; where texts are is known all the same.
        own = [window.arrays.get(name, [1] * len(window)) for window in windows]
        rows = [row + [fill] * (longest - len(row)) for row in own]
        tensors.append(torch.tensor(rows, dtype=torch.int64))
    return tuple(tensors)


def rows_of(examples: Sequence[TextExample]) -> list[int]:
    """For every row of the batch the number of its example."""
    return [index for index, example in enumerate(examples) for _ in example.windows]


def as_number(name: str | int, count: int) -> int | None:
    """A target that is a number below `count`; None where it isn't."""
    text = str(name)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else count
    return number if number < count else None


def unknown_target(name: str | int, expected: str) -> ItemError:
    """The reply to a target that isn't there."""
    return UnfitItem(f"target: unknown '{str(name)[:80]}'; expected {expected}")
