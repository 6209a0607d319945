"""Turns a flat setup_config.json, as TorchServe's Hugging Face example has it, into one block of ours.

Source: pytorch/serve, examples/Huggingface_Transformers: the keys, and that values may be text ("True", "150").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmap_ensemble.errors import ArchiveError

# What an archive is called where neither the command line nor the file says it.
DEFAULT_NAME = "ens"
# A block of ours is an object, so text under one of these can't be one.
MARKS = ("mode", "model_name", "save_mode")
FLAGS = ("do_lower_case", "captum_explanation", "FasterTransformer", "BetterTransformer", "model_parallel")
NUMBERS = ("num_labels", "max_length")
# Where the example's download script puts a model.
DOWNLOADED = "Transformer_model"


def is_flat(values: Mapping[str, Any]) -> bool:
    """Whether a setup_config.json is one block without a name."""
    return any(isinstance(values.get(key), str) for key in MARKS)


def read_flat(values: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Make a block of a flat file.

    Args:
        values: What the file holds: the example's keys, and any of ours.
        folder: Where it lies.
        where: What errors call it.

    Returns:
        The block. FasterTransformer or save_mode `torchscript` choose ft_bert_handler.py, all else
        bert_handler.py; members are model_name, where that is a directory, or what the example downloaded.

    Raises:
        ArchiveError: A flag or a number is neither, or model_parallel is asked for.
    """
    block = {key: value for key, value in values.items() if key != "name"}
    block.update({key: _flag(block[key], key, where) for key in FLAGS if key in block})
    block.update({key: _number(block[key], key, where) for key in NUMBERS if key in block})
    if block.pop("model_parallel", False):
        raise ArchiveError(f"{where}: model_parallel: one device holds all members here; leave it out")
    # A switch for a way to skip padding, which is always skipped here.
    block.pop("BetterTransformer", None)
    if "mode" in block:
        block["mode"] = str(block["mode"]).strip().replace(" ", "_")
    is_traced = block.pop("FasterTransformer", False) or block.get("save_mode") == "torchscript"
    if is_traced:
        block.update({"save_mode": "torchscript", "FasterTransformer": True})
    block.setdefault("handler", "ft_bert_handler.py" if is_traced else "bert_handler.py")
    name = str(block.get("model_name", ""))
    for place in (name, DOWNLOADED):
        if place and (folder / place).is_dir():
            block.setdefault("members", [place])
            break
    if name:
        block["model_name"] = Path(name).name  # the archive tells nobody where it was built
    return block


def _flag(value: Any, key: str, where: str) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "false": False}
    if not isinstance(value, str) or value.strip().lower() not in known:
        raise ArchiveError(f"{where}: {key}: expected true or false, got {value!r}")
    return known[value.strip().lower()]


def _number(value: Any, key: str, where: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise ArchiveError(f"{where}: {key}: expected a whole number, got {value!r}")
    return int(text)
