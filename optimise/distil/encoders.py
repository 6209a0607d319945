"""Turns an archive of encoders, and a directory or a number of layers, into a smaller encoder of the same tokens.

--layers 3      the members' architecture with fewer layers, each of which starts from one of the first member's
--to DIR        what save_pretrained wrote: another encoder, its weights where the directory has them
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimise.distil.students import Call
from optimise.errors import OptimiseError
from optimise.examples.teacher import Teacher
from optimise.output.write import stage_files
from vmap_ensemble.errors import first_line
from vmap_ensemble.models.architecture import TRANSFORMERS, build_architecture, build_plainly
from vmap_ensemble.models.transformers import CONFIG_FILE, PRETRAINED_FOLDER, import_transformers, read_config
from vmap_ensemble.tasks.text.windows import positions_of

# The number of a layer in a key of transformers.
LAYER = re.compile(r"\.(?:layer|layers)\.(\d+)\.")


def stage_student(teacher: Teacher, archive: Path, config: Any, folder: Path) -> None:
    """What the student's archive reads: tokenizer and labels of the members, and the student's config.

    Args:
        teacher: The ensemble.
        archive: It, unpacked.
        config: Of the student; gets the members' labels.
        folder: Made anew.
    """
    stage_files(archive, folder)
    names = {number: teacher.task.labels.get(number, str(number)) for number in range(teacher.classes)}
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    config.problem_type = None
    config.save_pretrained(folder / PRETRAINED_FOLDER)


def fewer_layers(archive: Path, count: int) -> Any:
    """The members' config with a number of layers.

    Raises:
        OptimiseError: They have no more than that.
    """
    config = read_config(archive / PRETRAINED_FOLDER, PRETRAINED_FOLDER)
    if not 1 <= count < config.num_hidden_layers:
        raise OptimiseError(f"--layers: expected fewer than the members' {config.num_hidden_layers}, got {count}")
    config.num_hidden_layers = count
    return config


def build_shallow(teacher: Teacher, folder: Path, count: int) -> nn.Module:
    """The student of fewer layers, on the first member's: layers at even distances, the last one among them."""
    state, own = teacher.forward.member_state(0), {}
    model = build_architecture(f"{TRANSFORMERS}{teacher.settings.mode}", None, folder)
    layers = 1 + max(int(found.group(1)) for key in state if (found := LAYER.search(key)))
    taken = [round((number + 1) * layers / count) - 1 for number in range(count)]
    for key in model.state_dict():
        found = LAYER.search(key)
        source = key if found is None else key.replace(found.group(), _numbered(found, taken[int(found.group(1))]))
        own[key] = state[source].cpu()
    model.load_state_dict(own)
    return model.float().eval()


def _numbered(found: re.Match[str], number: int) -> str:
    return found.group().replace(f".{found.group(1)}.", f".{number}.")


def open_directory(teacher: Teacher, directory: Path) -> Any:
    """The config of a directory that save_pretrained wrote, once its tokens turn out to be the members'.

    Raises:
        OptimiseError: It is no such directory, or its vocabulary is another.
        SettingsError: transformers can't read its config.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise OptimiseError(f"--to {directory}: expected one, heads, or a directory that save_pretrained wrote")
    config = read_config(directory, directory.name)
    tokens = teacher.text_task.tokenizer.get_vocab()
    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        own = _tokenizer_of(directory).get_vocab()
        if own != tokens:
            same = len(own.items() & tokens.items())
            raise _other_vocabulary(directory, f"{same} of its {len(own)} tokens have the same number")
    if config.vocab_size <= max(tokens.values()):
        raise _other_vocabulary(directory, f"it has embeddings of {config.vocab_size} tokens")
    return config


def _tokenizer_of(directory: Path) -> Any:
    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        return import_transformers().AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # whatever reading a tokenizer may raise
        raise OptimiseError(f"{directory.name}: its tokenizer can't be read ({first_line(error)})") from None


def _other_vocabulary(directory: Path, told: str) -> OptimiseError:
    return OptimiseError(
        f"{directory.name}: another vocabulary than the members' ({told}); a student reads their tokens: take one "
        "that was trained with their tokenizer"
    )


def build_from_directory(teacher: Teacher, directory: Path, folder: Path, seed: int) -> nn.Module:
    """The student with a directory's weights, where it has any, and a head drawn anew where it has no such one.

    Args:
        teacher: What it learns from.
        directory: Of config and weights.
        folder: Of the student's own config.
        seed: Of what is drawn.
    """
    torch.manual_seed(seed)
    model = build_plainly(f"{TRANSFORMERS}{teacher.settings.mode}", None, folder)
    weights = _read_weights(directory)
    fitting = {key: tensor for key, tensor in model.state_dict().items() if _fits(weights.get(key), tensor)}
    model.load_state_dict({key: weights[key] for key in fitting}, strict=False)
    return model.float().eval()


def check_positions(teacher: Teacher, model: nn.Module) -> None:
    """Refuse a student that can't read what the members read.

    Raises:
        OptimiseError: Both lengths.
    """
    positions, longest = positions_of(model), teacher.text_task.mode.max_length
    if positions is not None and positions < longest:
        raise OptimiseError(
            f"--to: the student has positions for {positions} tokens, the members read {longest}; build their "
            f"archive with max_length {positions}"
        )


def call_of(teacher: Teacher, model: nn.Module) -> Call:
    """How a student is called that may take fewer of the members' arguments: DistilBERT has no token types."""
    takes = inspect.signature(model.forward).parameters

    def call(run: Callable[..., Any], batch: Tensor) -> Any:
        _, keywords = teacher.forward.bind(*teacher.inputs.arguments(batch))
        return run(**{name: tensor for name, tensor in keywords.items() if name in takes})

    return call


def _fits(found: Tensor | None, own: Tensor) -> bool:
    return found is not None and found.shape == own.shape


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """model.safetensors or pytorch_model.bin, read as data; nothing where there is neither."""
    from safetensors.torch import load_file

    if (directory / "model.safetensors").is_file():
        return load_file(directory / "model.safetensors")
    if (directory / "pytorch_model.bin").is_file():
        return dict(torch.load(directory / "pytorch_model.bin", map_location="cpu", weights_only=True))
    return {}
