"""Turns directories that save_pretrained wrote into one config and one tokenizer that all members agree on."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archiver.texts.adapters import ADAPTER, ADAPTER_WEIGHTS, is_adapter
from archiver.texts.sentence import transformer_folder
from archiver.texts.tokenizers import (
    TOKENIZER_FILES,
    VOCABULARIES,
    check_code,
    compare_tokenizers,
    has_tokenizer,
    read_json,
    show,
)
from vmap_ensemble.core.states import State, renamed
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.models.text_modes import DEFAULT_MODE, TEXT_MODES, is_labelled
from vmap_ensemble.models.transformers import (
    CONFIG_FILE,
    PRETRAINED_FOLDER,
    model_class,
    read_config,
)

if TYPE_CHECKING:
    from archiver.source import Source

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Say how a checkpoint was made, not what it computes.
IGNORED_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")
# Heads of pre-training that hold the mode's own beside another.
_ALSO = {"fill_mask": ("ForPreTraining",)}


def find_directory(path: Path) -> Path | None:
    """The directory that holds config.json: a member's own, or that of the encoder of a sentence-transformers one."""
    if (path / CONFIG_FILE).is_file() or is_adapter(path):
        return path
    return transformer_folder(path)


def is_lone_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    whole = (folder / CONFIG_FILE).is_file() and any((folder / name).is_file() for name in (*WEIGHTS, *SHARDED))
    return is_adapter(folder) and not whole


def find_weights(folder: Path) -> Path | None:
    """The weights in a directory that save_pretrained wrote; None when it isn't one.

    Raises:
        ArchiveError: Its weights are sharded, or it holds a model and an adapter.
    """
    if not folder.is_dir():
        return None
    adapter = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if is_lone_adapter(folder):
        return adapter or folder / ADAPTER
    if not (folder / CONFIG_FILE).is_file():
        return None
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if is_adapter(folder):
        found = weights.name if weights else "sharded weights"
        raise ArchiveError(
            f"member '{folder.name}': holds a whole model ({found}) and an adapter ({ADAPTER}); if the adapter is "
            f"merged into the model, delete {ADAPTER} and {adapter.name if adapter else 'adapter_model.*'}; if it "
            f"isn't, move the adapter's files into a directory of their own"
        )
    sharded = next((name for name in SHARDED if (folder / name).is_file()), None)
    if weights is None and sharded:
        raise ArchiveError(
            f"member '{folder.name}': its weights are sharded ({sharded}); write one file with "
            "model.save_pretrained(folder, max_shard_size='1000GB')"
        )
    return weights


def choose_pretrained(sources: Sequence[Source], named: Path | None) -> Path | None:
    """The directory whose config.json and tokenizer go into the archive, after all members were compared with it.

    Args:
        sources: The members.
        named: The key `pretrained`; the first member's directory when None.

    Returns:
        None when no member is a Hugging Face directory and none is named.

    Raises:
        ArchiveError: config.json or the tokenizer is missing, or a member has another one.
    """
    folders = {source.name: source.folder for source in sources if source.folder is not None}
    if named is None and not folders:
        return None
    first, base = ("pretrained", named) if named is not None else next(iter(folders.items()))
    if base is None or not (base / CONFIG_FILE).is_file():
        raise ArchiveError(f"{first}: {base.name if base else ''}/{CONFIG_FILE}: no such file")
    if not has_tokenizer(base):
        raise ArchiveError(
            f"'{base.name}' holds no tokenizer ({', '.join(VOCABULARIES[:3])} …); add the one that the model was "
            "trained with: AutoTokenizer.from_pretrained(NAME).save_pretrained(folder), or name a directory that "
            "has it and config.json in the key 'pretrained' (--pretrained DIR)"
        )
    check_code(base, CONFIG_FILE, first)
    for name, folder in folders.items():
        check_code(folder, CONFIG_FILE, name)
        if folder != base:
            compare_configs(first, base, name, folder)
            compare_tokenizers(first, base, name, folder)
    return base


def check_heads(sources: Sequence[Source], mode: str) -> None:
    """Refuse members that were saved with another head than the mode's; an embedding has none.

    Keys alone don't tell: the head of a token classifier and of some sequence classifiers are called alike.

    Raises:
        ArchiveError: Names the class that was saved and the mode's.
    """
    if mode == "embedding" or mode not in TEXT_MODES:
        return
    for source in sources:
        if source.folder is None:
            continue
        saved = read_json(source.folder / CONFIG_FILE, source.name).get("architectures")
        wanted = model_class(read_config(source.folder, source.name), mode)
        if not isinstance(saved, list) or not saved or wanted is None:
            continue
        heads = {_head(wanted.__name__), *_ALSO.get(mode, ())}
        if not {_head(str(name)) for name in saved} & heads:
            raise ArchiveError(
                f"member '{source.name}': {CONFIG_FILE}: architectures is {', '.join(map(str, saved))}, but mode "
                f"'{mode}' takes {wanted.__name__}; its head has never been trained for that. Set the mode that the "
                "member was trained for"
            )


def _head(name: str) -> str:
    """BertForSequenceClassification -> ForSequenceClassification; a bare encoder's is Model."""
    found = re.search(r"(For[A-Z]\w*|With[A-Z]\w*|Model)$", name)
    return found.group() if found else name


def compare_configs(first: str, base: Path, name: str, folder: Path) -> None:
    """Refuse a member whose config.json says something else than the first one's.

    Raises:
        ArchiveError: Names the member, the key and both values.
    """
    expected, got = read_json(base / CONFIG_FILE, first), read_json(folder / CONFIG_FILE, name)
    if _difference(expected, got) is None:
        return
    # Versions of transformers write different defaults; with all of them filled in they compare.
    expected, got = read_config(base, first).to_dict(), read_config(folder, name).to_dict()
    key = _difference(expected, got)
    if key is not None:
        raise ArchiveError(
            f"member '{name}': {CONFIG_FILE}: {key} is {show(got, key)}, in '{first}' it is "
            f"{show(expected, key)}; all members must be one architecture"
        )


def _difference(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    missing = object()
    for key in (*expected, *got):
        if key not in IGNORED_KEYS and expected.get(key, missing) != got.get(key, missing):
            return key
    return None


def stage_pretrained(base: Path, root: Path) -> Path:
    """Copy config.json and the tokenizer into `root`/pretrained, as an archive has them; returns `root`."""
    target = root / PRETRAINED_FOLDER
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, *TOKENIZER_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    # Names of private machines and paths don't belong into an archive.
    config = read_json(target / CONFIG_FILE, base.name)
    config.pop("_name_or_path", None)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return root


def check_num_labels(settings: Mapping[str, Any], root: Path) -> None:
    """Refuse a `num_labels` of a classification that isn't the members'; settings as `check_block` passed them.

    Raises:
        ArchiveError: Both numbers.
    """
    wanted = int(settings.get("num_labels") or 0)  # text where it comes from TorchServe's example
    if not wanted or not is_labelled(str(settings.get("mode", DEFAULT_MODE))):
        return
    got = read_config(root / PRETRAINED_FOLDER, PRETRAINED_FOLDER).num_labels
    if wanted != got:
        raise ArchiveError(f"num_labels: the settings say {wanted}, the members' {CONFIG_FILE} has {got} labels")


def adapt_state(state: State, model: nn.Module, embedding: bool) -> tuple[State, list[str]]:
    """Bring a checkpoint of a sibling class or an older transformers to the model's keys.

    Args:
        state: Key -> tensor of one member.
        model: What its mode builds.
        embedding: The model is a bare encoder, which may come out of a checkpoint with a head.

    Returns:
        The state dict, and the keys that were left out because the model has no use for them.
    """
    known = set(model.state_dict())
    state = renamed(state, lambda key: _modern_key(key, known))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    heads: list[str] = []
    # Only where no key fits as it is, so that stripping can't mix two sets of weights.
    if embedding and not known & set(state) and any(key.startswith(prefix) for key in state):
        heads = [key for key in state if not key.startswith(prefix)]
        stripped = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
        state = {_modern_key(key.removeprefix(prefix), known): tensor for key, tensor in stripped.items()}
    if not known <= set(state):
        state = _converted(state, model) or state
    unused = [key for key, tensor in state.items() if key not in known and _is_spare(key, tensor)]
    # Called as the checkpoint calls them.
    left_out = [f"{prefix}{key}" for key in unused] if heads else unused
    return {key: tensor for key, tensor in state.items() if key not in unused}, [*heads, *left_out]


def _modern_key(key: str, known: set[str]) -> str:
    """LayerNorm.gamma and beta are what checkpoints converted from TensorFlow call weight and bias."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if key not in known and key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _converted(state: State, model: nn.Module) -> State | None:
    """The state dict as transformers reads it: save_pretrained writes some models otherwise than they are in memory.

    Mixtures of experts are written expert by expert, and renamed models as the first authors called their layers.

    Returns:
        None where transformers doesn't find all of the model's tensors in it either, or has no use for some.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    options = {"config": copy.deepcopy(model.config), "state_dict": dict(state), "dtype": dtype}
    read: Any = type(model).from_pretrained
    try:
        with _quiet_transformers():
            made, info = read(None, output_loading_info=True, **options)
    except Exception:  # whatever a conversion raises that lacks a tensor: the comparison of keys says what is wrong
        return None
    known = model.state_dict()
    foreign = [key for key in info["unexpected_keys"] if not _is_spare(key, state.get(key, torch.empty(0)))]
    if foreign or known.keys() & set(info["missing_keys"]):
        return None
    found: State = {key: tensor for key, tensor in made.state_dict().items() if key in known}
    return found


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the table of missing keys that transformers prints: our own line says what is wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _is_spare(key: str, tensor: Tensor) -> bool:
    """Poolers and pre-training heads of models that don't use them, and buffers that once were saved."""
    if key.endswith(("position_ids", "token_type_ids")):
        return not tensor.is_floating_point()
    return "pooler." in key or key.startswith("cls.seq_relationship.")
