"""Turns directories that save_pretrained wrote into one config and one tokenizer that all members agree on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vmap_ensemble.core.states import State
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.models.transformers import (
    CONFIG_FILE,
    LABELLED_MODES,
    PRETRAINED_FOLDER,
    import_transformers,
    read_config,
)

if TYPE_CHECKING:
    from archiver.source import Source

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
# Any one of these is a tokenizer; the others only say more about one.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "tokenizer.model", "unigram.json"),
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
# Say how a checkpoint was made, not what it computes.
IGNORED_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")
SHOWN_WIDTH = 80


def find_weights(folder: Path) -> Path | None:
    """The weights in a directory that save_pretrained wrote; None when it isn't one.

    Raises:
        ArchiveError: Its weights are sharded, or are an adapter alone.
    """
    if not folder.is_dir():
        return None
    if (folder / ADAPTER).is_file():
        raise ArchiveError(
            f"member '{folder.name}': holds an adapter ({ADAPTER}) without its model; merge it first: "
            "model.merge_and_unload().save_pretrained(folder)"
        )
    if not (folder / CONFIG_FILE).is_file():
        return None
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
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
    for name, folder in folders.items():
        if folder != base:
            compare_configs(first, base, name, folder)
            compare_tokenizers(first, base, name, folder)
    return base


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def compare_configs(first: str, base: Path, name: str, folder: Path) -> None:
    """Refuse a member whose config.json says something else than the first one's.

    Raises:
        ArchiveError: Names the member, the key and both values.
    """
    expected, got = _read_json(base / CONFIG_FILE, first), _read_json(folder / CONFIG_FILE, name)
    if _difference(expected, got) is None:
        return
    # Versions of transformers write different defaults; with all of them filled in they compare.
    expected, got = read_config(base, first).to_dict(), read_config(folder, name).to_dict()
    key = _difference(expected, got)
    if key is not None:
        raise ArchiveError(
            f"member '{name}': {CONFIG_FILE}: {key} is {_show(got, key)}, in '{first}' it is "
            f"{_show(expected, key)}; all members must be one architecture"
        )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArchiveError(f"member '{name}': {path.name}: expected JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArchiveError(f"member '{name}': {path.name}: expected an object, got {type(value).__name__}")
    return value


def _difference(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    missing = object()
    for key in (*expected, *got):
        if key not in IGNORED_KEYS and expected.get(key, missing) != got.get(key, missing):
            return key
    return None


def _show(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], default=str) if key in values else "absent"
    return text if len(text) <= SHOWN_WIDTH else text[: SHOWN_WIDTH - 1] + "…"


def compare_tokenizers(first: str, base: Path, name: str, folder: Path) -> None:
    """Refuse a member whose tokenizer numbers or lowers words otherwise; one without a tokenizer is fine.

    Raises:
        ArchiveError: Names the member, the token and both numbers.
    """
    if not has_tokenizer(folder) or _same_files(base, folder):
        return
    expected, got = _load_tokenizer(base, first), _load_tokenizer(folder, name)
    ours, theirs = expected.get_vocab(), got.get_vocab()
    for token in sorted({*ours, *theirs}, key=lambda token: (ours.get(token, len(ours)), token)):
        if ours.get(token) != theirs.get(token):
            raise ArchiveError(
                f"member '{name}': tokenizer: token {token!r} is {theirs.get(token, 'absent')}, in '{first}' it is "
                f"{ours.get(token, 'absent')}; all members must share one vocabulary"
            )
    normalizers = [_normalizer(tokenizer) for tokenizer in (got, expected)]
    if normalizers[0] != normalizers[1]:
        raise ArchiveError(
            f"member '{name}': tokenizer: normalizer is {normalizers[0]}, in '{first}' it is {normalizers[1]}; "
            "one request is tokenised once for all members"
        )


def _same_files(base: Path, folder: Path) -> bool:
    """Whether the files that make a tokenizer are the same bytes."""
    for name in VOCABULARIES:
        ours, theirs = base / name, folder / name
        if ours.is_file() != theirs.is_file():
            return False
        if ours.is_file() and ours.read_bytes() != theirs.read_bytes():
            return False
    return True


def _load_tokenizer(folder: Path, name: str) -> Any:
    try:
        return import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:  # what its own code raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArchiveError(f"member '{name}': the tokenizer can't be loaded ({line})") from None


def _normalizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps(json.loads(backend.to_str()).get("normalizer")) if backend is not None else "none"


def stage_pretrained(base: Path, root: Path) -> Path:
    """Copy config.json and the tokenizer into `root`/pretrained, as an archive has them; returns `root`."""
    target = root / PRETRAINED_FOLDER
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, *TOKENIZER_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    # Names of private machines and paths don't belong into an archive.
    config = _read_json(target / CONFIG_FILE, base.name)
    config.pop("_name_or_path", None)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return root


def check_num_labels(settings: Mapping[str, Any], root: Path) -> None:
    """Refuse a `num_labels` of a classification that isn't the members'; settings as `check_block` passed them.

    Raises:
        ArchiveError: Both numbers.
    """
    wanted = int(settings.get("num_labels") or 0)  # text where it comes from TorchServe's example
    if not wanted or settings.get("mode", LABELLED_MODES[0]) not in LABELLED_MODES:
        return
    got = read_config(root / PRETRAINED_FOLDER, PRETRAINED_FOLDER).num_labels
    if wanted != got:
        raise ArchiveError(f"num_labels: the settings say {wanted}, the members' {CONFIG_FILE} has {got} labels")


def check_tokenizer(base: str, root: Path) -> None:
    """Refuse a tokenizer that a worker couldn't use: one that has no fast form gives no characters of its tokens.

    Args:
        base: The name of the directory that it comes from.
        root: The staged root of the archive.

    Raises:
        ArchiveError: It can't be loaded, or is slow; names its class.
    """
    tokenizer = _load_tokenizer(root / PRETRAINED_FOLDER, base)
    if not getattr(tokenizer, "is_fast", False):
        raise ArchiveError(
            f"'{base}': its tokenizer, {type(tokenizer).__name__}, has only a slow form written in Python, which "
            "doesn't say which characters a token stands for; save a fast one (tokenizer.json) into the directory"
        )


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
    state = {_modern_key(key, known): tensor for key, tensor in state.items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    heads: list[str] = []
    # Only where no key fits as it is, so that stripping can't mix two sets of weights.
    if embedding and not known & set(state) and any(key.startswith(prefix) for key in state):
        heads = [key for key in state if not key.startswith(prefix)]
        stripped = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
        state = {_modern_key(key.removeprefix(prefix), known): tensor for key, tensor in stripped.items()}
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


def _is_spare(key: str, tensor: Tensor) -> bool:
    """Poolers and pre-training heads of models that don't use them, and buffers that once were saved."""
    if key.endswith(("position_ids", "token_type_ids")):
        return not tensor.is_floating_point()
    return "pooler." in key or key.startswith("cls.seq_relationship.")
