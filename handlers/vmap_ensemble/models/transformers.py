"""Turns pretrained/config.json of an archive into the transformers model that its members' weights go into."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vmap_ensemble.errors import SettingsError, first_line
from vmap_ensemble.models.text_modes import TEXT_MODES

PRETRAINED_FOLDER = "pretrained"
CONFIG_FILE = "config.json"


def import_transformers() -> Any:
    """Import transformers, which only text archives need.

    Raises:
        SettingsError: It isn't installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise SettingsError(
            f"text models need transformers ({error}); pip install -r requirements-bert.txt"
        ) from None
    return transformers


def read_config(folder: Path, where: str) -> Any:
    """Read a configuration of transformers from a folder; nothing is fetched and no code in it is run.

    Args:
        folder: Holds config.json.
        where: What errors call the folder.

    Raises:
        SettingsError: It is missing, malformed, or of an architecture that transformers doesn't have.
    """
    transformers = import_transformers()
    if not (folder / CONFIG_FILE).is_file():
        raise SettingsError(f"{where}/{CONFIG_FILE}: no such file; expected what save_pretrained writes")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks raise errors of their own for values of a wrong type
        told = f"transformers {transformers.__version__}: {first_line(error)}"
        raise SettingsError(f"{where}/{CONFIG_FILE}: {told}") from None


def model_class(config: Any, mode: str) -> Any:
    """The class that transformers builds of a configuration in a mode; None where it has none."""
    mapping = getattr(import_transformers(), TEXT_MODES[mode].mapping)
    return mapping.get(type(config), None)


def build_transformers(mode: str, folder: Path | None) -> nn.Module:
    """Build the model of one mode from `folder`/pretrained/config.json.

    Args:
        mode: A key of TEXT_MODES.
        folder: The unpacked archive.

    Returns:
        The model; attention is torch's scaled_dot_product_attention where the architecture has it. An
        embedding model has no pooler, since embeddings are made of the last layer's tokens.

    Raises:
        SettingsError: The mode is unknown, the configuration is missing, or its architecture lacks the mode or is an
            encoder with a decoder.
    """
    if mode not in TEXT_MODES:
        raise SettingsError(f"architecture 'transformers:{mode}': expected one of {', '.join(TEXT_MODES)}")
    if folder is None or not (folder / PRETRAINED_FOLDER).is_dir():
        raise SettingsError(
            f"architecture 'transformers:{mode}': no folder {PRETRAINED_FOLDER}/ in the archive; give members "
            "as directories that save_pretrained wrote, or name one in the key 'pretrained'"
        )
    config = read_config(folder / PRETRAINED_FOLDER, PRETRAINED_FOLDER)
    transformers = import_transformers()
    auto_name = TEXT_MODES[mode].auto_class
    kind = model_class(config, mode)
    if getattr(config, "is_encoder_decoder", False):
        raise SettingsError(
            f"{PRETRAINED_FOLDER}/{CONFIG_FILE}: model_type '{config.model_type}' is an encoder with a decoder, "
            "which can't be served; expected an encoder, such as BERT, RoBERTa or DeBERTa"
        )
    if kind is None:
        raise SettingsError(
            f"{PRETRAINED_FOLDER}/{CONFIG_FILE}: model_type '{config.model_type}' has no {auto_name}; "
            f"mode '{mode}' can't be served"
        )
    # What a decoder would keep for its next token is no output: texts are read once.
    for part in (config, config.get_text_config()):
        part.use_cache = False
    # float32 whatever the configuration says: the settings' dtype is applied to the members.
    options: dict[str, Any] = {
        "attn_implementation": "sdpa" if kind._supports_sdpa else "eager",
        "dtype": torch.float32,
    }
    if mode == "embedding" and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        return cast(nn.Module, getattr(transformers, auto_name).from_config(config, **options))
    except Exception as error:  # sizes that don't go together raise whatever building a layer raises
        told = f"{type(config).__name__} can't be built ({first_line(error)})"
        raise SettingsError(f"{PRETRAINED_FOLDER}/{CONFIG_FILE}: {told}") from None
