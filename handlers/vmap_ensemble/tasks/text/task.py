"""Turns an archive's settings and tokenizer into a text mode: what tasks on texts have in common.

The members may be weights (encoder_task.py) or traced modules (traced_task.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.archive.labels import read_labels
from vmap_ensemble.archive.settings import Settings
from vmap_ensemble.errors import ItemError, LoadError, SettingsError
from vmap_ensemble.models.text_modes import is_labelled
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER
from vmap_ensemble.tasks.answers import Answer, Options, dump_json
from vmap_ensemble.tasks.budget import Budget
from vmap_ensemble.tasks.task import Place, Task
from vmap_ensemble.tasks.text.inputs import TEXT_KEYS
from vmap_ensemble.tasks.text.mode import TextExample, TextMode, pad_windows
from vmap_ensemble.tasks.text.register import mode_class
from vmap_ensemble.tasks.text.settings import TextSettings
from vmap_ensemble.tasks.text.windows import agree_on_padding


class TextTask(Task):
    """A mode of an encoder: what is asked of texts.

    Args:
        settings: The archive's settings; they name the mode.
        place: What it may read, and where it computes.
        config: The members' transformers config.
        positions: Longest sequence that the members have positions for; None: any.
        vocabulary: Tokens that the members have embeddings of; None: any.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        mode: What is asked of a text.
        argument_names: The model's arguments, in order, that the tokenizer gives.
        pads: Argument -> what fills it behind a text's end.
    """

    settings_class: type[TextSettings] = TextSettings
    lists_are_batches = True
    reads_texts = True
    argument_names: list[str]

    def __init__(
        self,
        settings: Settings,
        place: Place,
        config: Any,
        positions: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(settings, place)
        self.tokenizer = load_tokenizer(self.settings, place)
        check_num_labels(self.settings, config)
        labels = read_labels(self._folder()) or {int(k): str(v) for k, v in config.id2label.items()}
        kind = mode_class(self.settings, config)
        self.mode: TextMode = kind(self.settings, self.tokenizer, labels, place.names, positions, vocabulary)
        self.pads = {
            "input_ids": agree_on_padding(self.tokenizer, config),
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }

    @classmethod
    def architecture_of(cls, settings: Any) -> str:
        """The transformers class that belongs to the mode."""
        return str(settings.architecture or f"transformers:{settings.mode}")

    @property
    def item_keys(self) -> tuple[str, ...] | None:
        """Keys that an item which is an object may have; any, where `parse` is one's own."""
        return (*self.mode.fields, *TEXT_KEYS) if type(self).parse is TextTask.parse else None

    def default_labels(self) -> dict[int, str]:
        """The labels of the members' config."""
        return self.mode.labels

    def parse(self, item: Any) -> TextExample:
        """Read and tokenise one item."""
        return self.mode.parse(item)

    def collate(self, examples: Sequence[TextExample]) -> tuple[Tensor, ...]:
        """Pad the windows of all examples to the longest: one (R, S) int64 tensor per argument of the model."""
        windows = [window for example in examples for window in example.windows]
        device = self.place.device
        return tuple(tensor.to(device) for tensor in pad_windows(windows, self.argument_names, self.pads))

    def size_of(self, example: TextExample) -> int:
        """Tokens over all windows."""
        return example.tokens

    def check_examples(self, examples: Sequence[TextExample]) -> None:
        """Count the tokens of a request's texts.

        Raises:
            TooLargeItem: They are more than `max_request_tokens`.
        """
        budget = Budget(self.settings.max_request_tokens, "tokens", "max_request_tokens")
        for example in examples:
            budget.spend(example.tokens)

    def see_outputs(self, outputs: Any) -> None:
        """A mode knows what its heads give."""

    def answers(
        self, outputs: Any, weights: Tensor, options: Sequence[Options], examples: Sequence[TextExample]
    ) -> list[Answer | ItemError]:
        """The mode's answers; TorchServe's plain form is for classifiers."""
        return self.mode.answers(outputs, weights, options, examples)

    def probabilities(self, outputs: Any, weights: Tensor) -> Tensor:
        """The mode's, (B, C): of classes that sum to 1, or of labels each on its own."""
        rows = next(leaf.shape[1] for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
        return self.mode.probabilities(outputs, weights.expand(-1, rows))

    @property
    def combines_classes(self) -> bool:
        """Whether the mode's answer is one of C classes."""
        return self.mode.combines_classes

    def sample_examples(self, count: int) -> list[TextExample]:
        """The mode's own sample items, of different lengths."""
        return [self.mode.encode(item) for item in self.mode.sample_items(count)]

    def sample_request(self) -> bytes:
        """The body of a request with the mode's own sample, to try an archive with."""
        (item,) = self.mode.sample_items(1)
        return dump_json(item if isinstance(item, dict) else {"text": item}).encode()


def load_tokenizer(settings: TextSettings, place: Place) -> Any:
    """The archive's tokenizer; nothing is fetched and no code of it is run.

    Raises:
        LoadError: It is a slow one, which doesn't say which characters a token stands for.
    """
    from transformers import AutoTokenizer  # here: it takes seconds, and image archives never need it

    options = {} if settings.do_lower_case is None else {"do_lower_case": settings.do_lower_case}
    folder = (place.folder or ".") / PRETRAINED_FOLDER  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_fast=True, **options
    )
    if not tokenizer.is_fast:
        raise LoadError(f"{PRETRAINED_FOLDER}/: expected a fast tokenizer (tokenizer.json), got a slow one")
    return tokenizer


def check_num_labels(settings: TextSettings, config: Any) -> None:
    """Refuse a `num_labels` that isn't the members'.

    Raises:
        SettingsError: Both numbers.
    """
    if is_labelled(settings.mode) and settings.num_labels and settings.num_labels != config.num_labels:
        raise SettingsError(
            f"setup_config.json: num_labels: {settings.num_labels}, but the members have {config.num_labels}"
        )


def argument_names(forward: Callable[..., Any], given: Sequence[str]) -> list[str]:
    """The inputs of a model: ids and mask, and token types where model and tokenizer know them.

    A forward takes them by name, wherever in its signature they stand; one without a mask is not given it.
    """
    takes_types = "token_type_ids" in given and "token_type_ids" in inspect.signature(forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_types else [])]
