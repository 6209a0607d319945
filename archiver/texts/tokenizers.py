"""Turns the tokenizers of directories into one that all members agree on and that fits their model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vmap_ensemble.errors import ArchiveError, first_line
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER, import_transformers

# Any one of these is a tokenizer; the others only say more about one.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "tokenizer.model", "unigram.json"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (*VOCABULARIES, TOKENIZER_CONFIG, "merges.txt", "special_tokens_map.json", "added_tokens.json")
# Parts of tokenizer.json that are set per call, or say nothing of a text's tokens.
_PER_CALL = ("truncation", "padding", "version", "decoder")
# What else decides on the tokens of a text.
_ATTRIBUTES = (
    *("model_max_length", "padding_side", "truncation_side", "model_input_names", "split_special_tokens"),
    *("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "pad_token_type_id"),
)
# transformers' own number for "no length is known" is 1e30.
NO_LENGTH = 10**9
CASED_PROBE = "Ana Lives In BERLIN ÀÉÖ WORLD The Order"
SHOWN_WIDTH = 80


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def load_tokenizer(folder: Path, name: str, **options: Any) -> Any:
    """Load a tokenizer from a folder; nothing is fetched and no code in it is run.

    Raises:
        ArchiveError: It can't be loaded, or brings code.
    """
    check_code(folder, TOKENIZER_CONFIG, name)
    try:
        auto = import_transformers().AutoTokenizer
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises Exception itself for versions that it doesn't know
        raise ArchiveError(f"member '{name}': the tokenizer can't be loaded ({first_line(error)})") from None


def check_code(folder: Path, file: str, name: str) -> None:
    """Refuse a file that names code of its own (`auto_map`), which would have to be run.

    Raises:
        ArchiveError: Names the file and the classes.
    """
    try:
        value = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads it says what is wrong
    code = value.get("auto_map") if isinstance(value, dict) else None
    if code:
        raise ArchiveError(
            f"member '{name}': {file} brings code of its own (auto_map: {_short(code)}), which is never run; if "
            "transformers' own class is the same, take auto_map out of the file"
        )


def compare_tokenizers(first: str, base: Path, name: str, folder: Path) -> None:
    """Refuse a member whose tokenizer gives other tokens; one without a tokenizer is fine.

    Raises:
        ArchiveError: Names the member, what differs and both values.
    """
    if not has_tokenizer(folder) or _same_files(base, folder):
        return
    expected, got = load_tokenizer(base, first), load_tokenizer(folder, name)
    ours, theirs = expected.get_vocab(), got.get_vocab()
    for token in sorted({*ours, *theirs}, key=lambda token: (ours.get(token, len(ours)), token)):
        if ours.get(token) != theirs.get(token):
            raise ArchiveError(
                f"member '{name}': tokenizer: token {token!r} is {theirs.get(token, 'absent')}, in '{first}' it is "
                f"{ours.get(token, 'absent')}; all members must share one vocabulary"
            )
    own, other = _facts(expected), _facts(got)
    differs = _first_difference(own, other)
    if differs is not None:
        key, ours, theirs = differs
        raise ArchiveError(
            f"member '{name}': tokenizer: {key} is {_short(theirs)}, in '{first}' it is {_short(ours)}; "
            "one request is tokenised once for all members"
        )


def _first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The dotted path of the first value that differs, and both values."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None if ours == theirs else (path, ours, theirs)
    for key in {**ours, **theirs}:
        found = _first_difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
        if found is not None:
            return found
    return None


def _same_files(base: Path, folder: Path) -> bool:
    """Whether the files that make a tokenizer are the same bytes."""
    for name in TOKENIZER_FILES:
        ours, theirs = base / name, folder / name
        if ours.is_file() != theirs.is_file():
            return False
        if ours.is_file() and ours.read_bytes() != theirs.read_bytes():
            return False
    return True


def _facts(tokenizer: Any) -> dict[str, Any]:
    """All that decides on a text's tokens, the vocabulary left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    model = {key: value for key, value in (parts.pop("model", None) or {}).items() if key != "vocab"}
    facts = {key: value for key, value in parts.items() if key not in _PER_CALL}
    facts.update({f"model.{key}": value for key, value in model.items()})
    facts.update({key: getattr(tokenizer, key, None) for key in _ATTRIBUTES})
    facts["is_fast"] = bool(getattr(tokenizer, "is_fast", False))
    if backend is None:
        facts["settings"] = {key: str(value) for key, value in getattr(tokenizer, "init_kwargs", {}).items()}
    return facts


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_WIDTH else text[: SHOWN_WIDTH - 1] + "…"


def check_tokenizer(base: str, root: Path) -> None:
    """Refuse a tokenizer that a worker couldn't use: one that has no fast form gives no characters of its tokens.

    Args:
        base: The name of the directory that it comes from.
        root: The staged root of the archive.

    Raises:
        ArchiveError: It can't be loaded, or is slow; names its class.
    """
    tokenizer = load_tokenizer(root / PRETRAINED_FOLDER, base)
    if not getattr(tokenizer, "is_fast", False):
        raise ArchiveError(
            f"'{base}': its tokenizer, {type(tokenizer).__name__}, has only a slow form written in Python, which "
            "doesn't say which characters a token stands for; save a fast one (tokenizer.json) into the directory"
        )


def set_lower_case(wanted: bool | None, base: str, root: Path) -> None:
    """Make the staged tokenizer honour `do_lower_case`, also where its class doesn't know the option.

    Args:
        wanted: The setting; None leaves the choice to the tokenizer.
        base: The name of the directory that it comes from.
        root: The staged root of the archive.

    Raises:
        ArchiveError: It lowers texts, isn't to, and its class has no switch for it.
    """
    if wanted is None:
        return
    folder = root / PRETRAINED_FOLDER
    tokenizer = load_tokenizer(folder, base, do_lower_case=wanted)
    if _lowers(tokenizer) == wanted:
        return
    if wanted:
        from tokenizers import normalizers

        backend = tokenizer.backend_tokenizer
        own = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        tokenizer.save_pretrained(folder)
        tokenizer = load_tokenizer(folder, base, do_lower_case=wanted)
    if _lowers(tokenizer) != wanted:
        raise ArchiveError(
            f"do_lower_case: {str(wanted).lower()} has no effect on the tokenizer of '{base}', "
            f"{type(tokenizer).__name__}; save the tokenizer as it is meant, and leave the key out"
        )


def _lowers(tokenizer: Any) -> bool:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (CASED_PROBE, CASED_PROBE.lower())]
    normalizer = tokenizer.backend_tokenizer.normalizer
    # A vocabulary that knows neither spelling gives the same tokens for both.
    plain = normalizer is None or normalizer.normalize_str(CASED_PROBE) != normalizer.normalize_str(
        CASED_PROBE.lower()
    )
    return ids[0] == ids[1] and not plain


def fit_tokenizer(base: str, root: Path, model: nn.Module) -> None:
    """Bring the staged tokenizer to the model's sizes: no longer texts than positions, no tokens that it hasn't.

    Args:
        base: The name of the directory that it comes from.
        root: The staged root of the archive.
        model: What the mode builds.

    Raises:
        ArchiveError: The tokenizer has a token, or a kind of text, that the model has no embedding for.
    """
    folder = root / PRETRAINED_FOLDER
    tokenizer = load_tokenizer(folder, base)
    _check_tokens(tokenizer, base, model)
    positions = count_positions(model)
    if positions is not None and tokenizer.model_max_length > positions:
        path = folder / TOKENIZER_CONFIG
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        values["model_max_length"] = positions
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_tokens(tokenizer: Any, base: str, model: Any) -> None:
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # some architectures don't say where theirs is
        rows = None
    # Classes add special tokens of their own, which no text holds: a request that spells one is refused.
    special = set(tokenizer.all_special_tokens)
    numbers = {token: number for token, number in tokenizer.get_vocab().items() if token not in special}
    token, highest = max(numbers.items(), key=lambda item: item[1])
    if rows is not None and highest >= rows:
        raise ArchiveError(
            f"'{base}': the tokenizer's token {token!r} is {highest}, the model has embeddings for 0 to {rows - 1}; "
            "resize them where you trained: model.resize_token_embeddings(len(tokenizer)), or save the tokenizer "
            "that the model was trained with"
        )
    kinds = getattr(model.config, "type_vocab_size", None)
    if kinds and "token_type_ids" in tokenizer.model_input_names:
        largest = max(tokenizer("a", "a").get("token_type_ids") or [0])
        if largest >= kinds:
            raise ArchiveError(
                f"'{base}': the tokenizer gives token_type_ids up to {largest}, the model knows {kinds}; save the "
                "tokenizer that the model was trained with, or without token_type_ids in model_input_names"
            )


def count_positions(model: Any) -> int | None:
    """The longest sequence that a model has positions for; None where nothing bounds it.

    RoBERTa and its kin count positions from behind the padding's number: 514 rows are 512 positions.
    """
    rows = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            rows.append(module.num_embeddings - offset)
    if rows:
        return min(rows)
    declared = getattr(model.config, "max_position_embeddings", None)
    return declared if isinstance(declared, int) and declared > 0 else None


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a member.

    Raises:
        ArchiveError: It is missing, not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(f"member '{name}': {path.name}: expected JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArchiveError(f"member '{name}': {path.name}: expected an object, got {type(value).__name__}")
    return value


def show(values: Mapping[str, Any], key: str) -> str:
    """One value for an error message."""
    return _short(values[key]) if key in values else "absent"
