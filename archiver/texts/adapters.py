"""Turns the directory of an adapter that peft saved into a directory of the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from archiver.texts.tokenizers import TOKENIZER_FILES, has_tokenizer
from vmap_ensemble.archive.checkpoints import read_state_dict
from vmap_ensemble.errors import ArchiveError, first_line
from vmap_ensemble.models.transformers import import_transformers

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# peft's task -> the class of transformers that an adapter of it sits in.
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
BY_HAND = "merge it where you trained: model.merge_and_unload().save_pretrained(folder)"


def merge_adapter(folder: Path, target: Path | None) -> Path:
    """Merge an adapter into its base model with peft; nothing is fetched and no code of either is run.

    Args:
        folder: What peft's save_pretrained wrote. Its base model is a directory, or lies in the hub's cache.
        target: Where the whole model goes, with the tokenizer.

    Returns:
        `target`.

    Raises:
        ArchiveError: peft isn't installed, the base model isn't here, or they don't go together.
    """
    where = f"member '{folder.name}'"
    try:
        import peft
    except ImportError:
        raise ArchiveError(
            f"{where}: an adapter ({ADAPTER}); pip install peft merges it here, or {BY_HAND}"
        ) from None
    if target is None:
        raise ArchiveError(f"{where}: an adapter ({ADAPTER}) without its model; {BY_HAND}")
    base, task = _read(folder, where)
    transformers = import_transformers()
    try:
        model = getattr(transformers, TASKS[task]).from_pretrained(
            base, local_files_only=True, trust_remote_code=False, **_head(folder, task)
        )
        merged = peft.PeftModel.from_pretrained(model, str(folder), local_files_only=True).merge_and_unload()
        merged.save_pretrained(target)
        _copy_tokenizer(transformers, folder, base, target)
    except Exception as error:  # peft and transformers raise what they like; the line says what to do
        raise ArchiveError(
            f"{where}: merging the adapter into '{base}' fails ({first_line(error)}); {BY_HAND}"
        ) from None
    return target


def _read(folder: Path, where: str) -> tuple[str, str]:
    """The base model, as a path where it is one, and peft's name of the task."""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, task = config.get("base_model_name_or_path"), config.get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ArchiveError(f"{where}: {ADAPTER}: expected a JSON object ({error})") from None
    if not isinstance(base, str) or not base:
        raise ArchiveError(f"{where}: {ADAPTER} names no base model (base_model_name_or_path); {BY_HAND}")
    if task not in TASKS:
        raise ArchiveError(
            f"{where}: {ADAPTER}: task_type: expected one of {', '.join(TASKS)}, got {task!r}; {BY_HAND}"
        )
    beside = next((place for place in (folder / base, folder.parent / base) if place.is_dir()), None)
    return str(beside or base), task


def _head(folder: Path, task: str) -> dict[str, Any]:
    """The number of labels, which the adapter's own head tells and the base's config doesn't."""
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if task not in ("SEQ_CLS", "TOKEN_CLS") or file is None:
        return {}
    heads = [
        tensor.shape[0]
        for key, tensor in read_state_dict(file).items()
        if "lora_" not in key and key.endswith(("classifier.weight", "out_proj.weight", "score.weight"))
    ]
    return {"num_labels": heads[-1], "ignore_mismatched_sizes": True} if heads else {}


def _copy_tokenizer(transformers: Any, folder: Path, base: str, target: Path) -> None:
    """The tokenizer that was saved with the adapter, or else the base's."""
    if has_tokenizer(folder):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(target)


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter, with or without a model."""
    return (folder / ADAPTER).is_file()
