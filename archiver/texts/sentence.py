"""Turns a sentence-transformers directory into settings of an embedding, or one line why it can't be served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archiver.texts.tokenizers import read_json
from vmap_ensemble.errors import ArchiveError

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
# Earlier releases, and the setting's name -> how the tokens' vectors become the text's.
_OLD_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SERVED = ("mean", "cls")


@dataclass(frozen=True)
class SentenceModel:
    """What a sentence-transformers directory says beside its encoder.

    Attributes:
        settings: Keys of ours -> values that do the same.
        notes: What is left to whoever asks.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def transformer_folder(folder: Path) -> Path | None:
    """The directory of the encoder inside a sentence-transformers directory; None where there is none."""
    if not (folder / MODULES_FILE).is_file():
        return None
    for kind, path in _modules(folder, folder.name):
        if kind == "Transformer":
            return folder / path if path else folder
    return None


def read_sentence_model(folder: Path, name: str) -> SentenceModel | None:
    """What a sentence-transformers directory says; None where a directory is none.

    Args:
        folder: The directory, or that of the encoder inside of it.
        name: What errors call the member.

    Raises:
        ArchiveError: A module, a kind of pooling or a prompt that answers here can't have.
    """
    home = next((place for place in (folder, folder.parent) if transformer_folder(place) == folder), None)
    if home is None:
        return None
    settings: dict[str, Any] = {}
    kinds = []
    for kind, path in _modules(home, name):
        kinds.append(kind)
        if kind == "Pooling":
            settings["pooling"] = _pooling(read_json(home / path / "config.json", name), name)
        elif kind not in ("Transformer", "Normalize", "Dropout"):
            raise ArchiveError(
                f"member '{name}': {MODULES_FILE}: a {kind} module after the encoder can't be served; an embedding "
                f"here is the mean of the tokens' vectors or the first one's, normalised. Serve a model without it"
            )
    if "Pooling" not in kinds:
        raise ArchiveError(f"member '{name}': {MODULES_FILE}: no Pooling module, so no vector of a text is defined")
    settings.update(_length(folder, name))
    notes = _prompts(home, name, "Normalize" in kinds)
    return SentenceModel(settings, tuple(notes))


def _modules(folder: Path, name: str) -> list[tuple[str, str]]:
    """(kind, path) of the modules, in order; the kind is the last part of the class's name."""
    try:
        rows = json.loads((folder / MODULES_FILE).read_text(encoding="utf-8"))
        return [(str(row["type"]).rpartition(".")[2], str(row.get("path", ""))) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveError(f"member '{name}': {MODULES_FILE}: expected a list of modules ({error!r})") from None


def _pooling(config: Mapping[str, Any], name: str) -> str:
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        modes = [mode]
    elif isinstance(mode, list):
        modes = [str(item) for item in mode]
    else:
        modes = [ours for key, ours in _OLD_SWITCHES.items() if config.get(key)] or ["mean"]
    if len(modes) != 1 or modes[0] not in SERVED:
        raise ArchiveError(
            f"member '{name}': Pooling: {' + '.join(modes)} can't be served; expected one of {', '.join(SERVED)}"
        )
    return modes[0]


def _length(folder: Path, name: str) -> dict[str, Any]:
    path = folder / LENGTH_FILE
    values = read_json(path, name) if path.is_file() else {}
    found: dict[str, Any] = {}
    if values.get("max_seq_length"):
        found["max_length"] = int(values["max_seq_length"])
    if values.get("do_lower_case"):
        found["do_lower_case"] = True
    return found


def _prompts(home: Path, name: str, normalised: bool) -> list[str]:
    path = home / PROMPTS_FILE
    values = read_json(path, name) if path.is_file() else {}
    prompts = values.get("prompts") or {}
    default = values.get("default_prompt_name")
    if default and prompts.get(default):
        raise ArchiveError(
            f"member '{name}': {PROMPTS_FILE}: puts the prompt {prompts[default]!r} before every text "
            f"(default_prompt_name), which can't be done here; set that to null and let clients put it before theirs"
        )
    similarity = values.get("similarity_fn_name")
    if not normalised and similarity not in (None, "cosine"):
        raise ArchiveError(
            f"member '{name}': {PROMPTS_FILE}: vectors are compared by '{similarity}' and not normalised, but "
            "embeddings here are always normalised; set similarity_fn_name to cosine if that will do"
        )
    given = ", ".join(f"{key}: {text!r}" for key, text in prompts.items() if text)
    return [f"prompts of {name} are not added, clients put them before their texts ({given})"] if given else []


def join_sentence_models(
    folders: Mapping[str, Path], given: Mapping[str, Any]
) -> tuple[dict[str, Any], Sequence[str]]:
    """The settings that all members' directories agree on, without those that the block gives itself.

    Args:
        folders: Member -> its directory.
        given: The block's settings.

    Raises:
        ArchiveError: Members that say different things, or as `read_sentence_model`.
    """
    models = {name: read_sentence_model(folder, name) for name, folder in folders.items()}
    says = {name: model for name, model in models.items() if model is not None}
    if not says:
        return {}, ()
    first, expected = next(iter(says.items()))
    for name, model in models.items():
        theirs = model.settings if model is not None else {}
        for key in {**expected.settings, **theirs}:
            if theirs.get(key) != expected.settings.get(key) and key not in given:
                raise ArchiveError(
                    f"member '{name}': sentence-transformers: {key} is {theirs.get(key, 'absent')}, in '{first}' it "
                    f"is {expected.settings.get(key, 'absent')}; say which one is meant in the key '{key}'"
                )
    settings = {key: value for key, value in expected.settings.items() if key not in given}
    return settings, expected.notes
