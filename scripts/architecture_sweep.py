"""Turns every classifier family that torchvision and transformers know into a row: how an ensemble of it is served.

Two small random members of each are archived by ./archive.sh's own code and loaded by the library's, and the answers
are compared with those of the plain models, one input at a time. Nothing is chosen by name: what a new release brings
is tried as well.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from archiver import HANDLERS
from archiver.blocks.request import make_request
from archiver.build import build_archive
from vmap_ensemble.core.proof import TOLERANCE as PROVED
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import EnsembleError, first_line
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.register import ExecutionOptions

MEMBERS = 2
CLASSES = 3
# Largest difference to the plain models' logits, relative to the largest of them.
TOLERANCE = PROVED[torch.float32]


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        name: torchvision's name of the network, or transformers' `model_type`.
        family: What else it stands for: the other networks of its file, or the class of its models.
        refused: The one line that refuses it; empty if it is served.
        vmap: Whether one call of vmap gives the members' own numbers; otherwise the plain loop over members serves.
        prepared: Whether the CPU's prepared form does.
        padding: What becomes of the padding of texts, or how examples of a batch are run.
        difference: The largest relative difference between the answers and the plain models' own.
        is_untried: Whether the plain model itself could not be made, or asked; `refused` says why.
    """

    name: str
    family: str
    refused: str = ""
    vmap: bool = False
    prepared: bool = False
    padding: str = ""
    difference: float = 0.0
    is_untried: bool = False


class WrongAnswer(Exception):
    """An ensemble that is served gives other numbers than its members."""


def serve(settings: dict[str, Any], states: Path, work: Path) -> Ensemble:
    """Archive members with ./archive.sh's code and load the archive with the library's.

    Args:
        settings: A block of setup_config.json without its members.
        states: Folder of the members, removed once they are archived: a gigabyte of VGG's.
        work: Scratch.

    Raises:
        EnsembleError: The members are refused.
    """
    block = {**settings, "members": [str(states)]}
    request = make_request("tried", {"tried": block}, work, no_check=True)
    with (work / "log.txt").open("w") as log:
        archive = build_archive(request, work / "store", True, Console(file=log))
    shutil.rmtree(states)
    return Ensemble.load(archive, execution="reference")


def fill_row(row: Row, ensemble: Ensemble, inputs: list[Any], own: Tensor) -> Row:
    """The row of an architecture that is served.

    Args:
        row: With name and family.
        ensemble: Of its members.
        inputs: What the ensemble is asked, in one batch.
        own: (M, B, C) logits of the plain models, each input alone.

    Raises:
        WrongAnswer: The ensemble's outputs or answers aren't those of the plain models.
    """
    logits = ensemble.outputs(inputs)
    logits = next(leaf for leaf in _leaves(logits) if leaf.shape == own.shape)
    difference = _difference(logits, own)
    expected = own.softmax(-1).mean(0)
    bodies = [answer.body for answer in ensemble.predict(inputs, top_k=CLASSES)]
    ranked = [sorted(body["top_k"], key=lambda one: one["index"]) for body in bodies]
    answered = torch.tensor([[one["probability"] for one in row] for row in ranked])
    difference = max(difference, _difference(answered, expected))
    if not difference <= TOLERANCE:
        raise WrongAnswer(f"{row.name}: differs from the plain models by {difference:.1e}")
    args = ensemble.task.collate(ensemble.task.sample_examples(2))
    can = {mode: _can(ensemble, mode, args) for mode in ("eager", "prepared")}
    padding = "one by one" if ensemble.alone else ""
    return dataclasses.replace(
        row, vmap=can["eager"], prepared=can["prepared"], padding=padding, difference=difference
    )


@torch.inference_mode()
def _can(ensemble: Ensemble, mode: str, args: tuple[Any, ...]) -> bool:
    """Whether a mode gives the members' own numbers."""
    try:
        build_execution(mode, ensemble.forward, [args], ExecutionOptions(tolerance=TOLERANCE))
    except EnsembleError:
        return False
    return True


def _leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(ours: Tensor, own: Tensor) -> float:
    return float((ours.double() - own.double()).abs().max() / own.double().abs().max().clamp_min(1e-30))


# --- images --------------------------------------------------------------------------------------------------


def image_families() -> dict[str, list[str]]:
    """The smallest network of each of torchvision's files of classifiers -> all networks of that file."""
    from torchvision import models

    by_file: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        by_file.setdefault(models.get_model_builder(name).__module__, []).append(name)

    def size(name: str) -> int:
        return int(models.get_model_weights(name).DEFAULT.meta["num_params"])

    return {min(names, key=size): names for names in by_file.values()}


# Pixels of a side: of most networks, and of those that are made for one size.
SMALL_IMAGE, FULL_IMAGE = 96, 224


@torch.inference_mode()
def _takes(model: nn.Module, size: int) -> bool:
    try:
        model(torch.zeros(1, 3, size, size))
    except Exception:  # each network refuses a size in its own way
        return False
    return True


def try_image(name: str, work: Path) -> Row:
    """Two random members of one of torchvision's networks.

    Args:
        name: torchvision's name of it.
        work: An empty folder.

    Raises:
        WrongAnswer: It is served with other numbers than its members'.
    """
    from torchvision.models import get_model

    family = next(names for key, names in image_families().items() if key == name)
    row = Row(name, ", ".join(names for names in family if names != name))
    models = [_seeded(lambda: get_model(name, weights=None, num_classes=CLASSES), seed) for seed in range(MEMBERS)]
    size = SMALL_IMAGE if _takes(models[0], SMALL_IMAGE) else FULL_IMAGE
    (work / "members").mkdir()
    for index, model in enumerate(models):
        torch.save(model.state_dict(), work / "members" / f"seed{index}.pt")
    settings = {"handler": str(HANDLERS / "resnet_handler.py"), "architecture": f"torchvision:{name}"}
    try:
        ensemble = serve({**settings, "input_shape": [3, size, size]}, work / "members", work)
    except EnsembleError as error:
        return dataclasses.replace(row, refused=first_line(error))
    inputs = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return fill_row(row, ensemble, list(inputs), _ask(models, [{"x": image[None]} for image in inputs]))


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network in eval mode whose outputs tell inputs apart: random weights of a trained one's size."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inception and GoogLeNet: their initialisation takes long
        model = build().eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if buffer.is_floating_point() and "running_" in key:
                buffer.copy_(torch.rand_like(buffer) * 0.5 + 0.5)
    return model


@torch.inference_mode()
def _ask(models: list[nn.Module], inputs: list[dict[str, Tensor]]) -> Tensor:
    """(M, B, C) logits, each input alone."""

    def logits(output: Any) -> Tensor:
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found

    return torch.stack([torch.cat([logits(_call(model, row)) for row in inputs]) for model in models])


def _call(model: nn.Module, row: dict[str, Tensor]) -> Any:
    return model(row["x"]) if "x" in row else model(**row)


# --- texts ---------------------------------------------------------------------------------------------------

TEXTS = ["a cat sat", "dogs ran home to their good old house while it rained", "bad mat"]
WORDS = sorted({word for text in TEXTS for word in text.split()})
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Names that transformers' configurations give to sizes -> a small one. Where a family wants others, see OTHERS.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "d_latents"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "n_routed_experts", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "d_inner", "n_inner", "max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "num_latents"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "entity_vocab_size", "entity_emb_size"), 16),
    **{"num_experts_per_tok": 2, "vocab_size": 64},
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What SMALL doesn't fit, by `model_type`.
OTHERS: dict[str, dict[str, Any]] = {
    **{key: {"num_key_value_heads": 4} for key in ("axk2", "deepseek_v2", "deepseek_v3", "esmc", "minicpm3")},
    "axk1": {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "funnel": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mistral4": {"num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 16},
    "modernvbert": {"text_config": {"pad_token_id": 0}},
    "qwen3_5": {"text_config": {**_HYBRID, "pad_token_id": 0}},
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "reformer": {"axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def text_families() -> dict[str, str]:
    """transformers' `model_type` of every sequence classifier -> the class of its models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def small_config(kind: str) -> Any:
    """A tiny configuration of a `model_type`, whose weights are large enough to tell texts apart."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: Any = CONFIG_MAPPING[kind]
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 2}
    sizes = _sizes(made())
    for key, value in OTHERS.get(kind, {}).items():
        sizes[key] = {**sizes[key], **value} if isinstance(sizes.get(key), dict) else value
    return made(**sizes, **tokens, num_labels=CLASSES)


def _sizes(config: Any) -> dict[str, Any]:
    """SMALL for what a configuration has, its nested ones included."""
    from transformers import PretrainedConfig

    said = vars(config)
    nested = {key: _sizes(value) for key, value in said.items() if isinstance(value, PretrainedConfig)}
    own = {key: value for key, value in SMALL.items() if key in said and isinstance(said[key], int | None)}
    ranges = {key: 0.3 for key in ("initializer_range", "init_std") if key in said}
    return {**own, **ranges, **nested}


def save_small_tokenizer(folder: Path) -> None:
    """Words and BERT's special tokens, for whatever model: the ids are what it gets."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **names)
    fast.save_pretrained(folder)


def try_text(kind: str, work: Path) -> Row:
    """Two random members of one of transformers' sequence classifiers.

    Args:
        kind: transformers' `model_type`.
        work: An empty folder.

    Raises:
        WrongAnswer: It is served with other numbers than its members'.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from vmap_ensemble.encoders.forward import PackedEncoderForward

    row = Row(kind, text_families()[kind])
    try:
        config = small_config(kind)
        models: list[Any] = [
            _seeded(lambda: AutoModelForSequenceClassification.from_config(config), seed) for seed in range(MEMBERS)
        ]
        for seed, model in enumerate(models):
            model.save_pretrained(work / "members" / f"seed{seed}")
            save_small_tokenizer(work / "members" / f"seed{seed}")
        tokenizer = AutoTokenizer.from_pretrained(work / "members" / "seed0", local_files_only=True)
        takes = inspect.signature(models[0].forward).parameters
        rows = [{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k in takes} for text in TEXTS]
        own = _ask(models, rows)
    except Exception as error:  # whatever transformers' own model may want beside texts
        return dataclasses.replace(row, refused=f"{type(error).__name__}: {first_line(error)}", is_untried=True)
    try:
        ensemble = serve({"handler": str(HANDLERS / "bert_handler.py")}, work / "members", work)
    except EnsembleError as error:
        return dataclasses.replace(row, refused=first_line(error))
    row = fill_row(row, ensemble, TEXTS, own)
    is_packed = isinstance(ensemble.forward, PackedEncoderForward)
    padding = row.padding or ("removed" if is_packed else "to the longest text")
    return dataclasses.replace(row, padding=padding)
