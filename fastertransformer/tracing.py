"""A BERT checkpoint -> one TorchScript file, compared with the checkpoint before it is there."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastertransformer import LIBRARY
from fastertransformer.library import BuildError, ensure_library
from fastertransformer.modules import convert_model
from vmap_ensemble.encoders.traced.answers import ANSWERS_FILE, RecordedAnswers
from vmap_ensemble.encoders.traced.library import load_ft_library
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.device import DTYPES

# Largest difference of logits to the checkpoint in the same dtype, relative to the largest logit where that is above
# 1: rounding grows with the numbers, in Hugging Face's own result as in ours. Half precision: rounding of 12 layers.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}
# The batch whose answers are recorded in the file.
RECORDED_TEXTS, RECORDED_TOKENS = 2, 32
# What the class computes: its interface has no field for any of these.
REQUIRED = {
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-12,),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


class TraceError(EnsembleError):
    """A checkpoint can't be traced as asked; the text says why and what to do."""


@dataclass(frozen=True)
class Example:
    """A ragged right-padded batch on the tracing device."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


def check_config(config: Any, max_length: int) -> None:
    """Refuse what the encoder class can't compute, before any weight is read.

    Raises:
        TraceError: Another architecture than BERT, another activation or epsilon, or too long a max_seq_length.
    """
    if config.model_type != "bert":
        raise TraceError(
            f"model_type of the checkpoint: expected 'bert', got {config.model_type!r}; the FasterTransformer "
            "encoder computes BERT's layers only. Serve this checkpoint with the BERT handler"
        )
    for name, allowed in REQUIRED.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise TraceError(
                f"{name} of the checkpoint: expected {allowed[0]!r}, got {value!r}; the FasterTransformer encoder "
                "has no other. Serve this checkpoint with the BERT handler"
            )
    if not 1 <= max_length <= config.max_position_embeddings:
        raise TraceError(
            f"--max_seq_length: expected 1 to {config.max_position_embeddings} (the checkpoint's positions), "
            f"got {max_length}"
        )


def load_checkpoint(name: str, mode: str, max_length: int) -> Any:
    """Read a checkpoint's weights in eval mode; heads that the checkpoint lacks are an error, not random numbers.

    Raises:
        TraceError: It isn't there, isn't BERT, or lacks weights of this mode's head.
    """
    import transformers

    classes = {
        "sequence_classification": transformers.BertForSequenceClassification,
        "question_answering": transformers.BertForQuestionAnswering,
        "token_classification": transformers.BertForTokenClassification,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_config(config, max_length)
        loader: Any = classes[mode]  # its stub omits output_loading_info, which returns a pair
        model, report = loader.from_pretrained(
            name, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise TraceError(f"--model_name_or_path {name!r}: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if "position_ids" not in key)
    if missing:
        raise TraceError(
            f"--model_name_or_path {name!r} has no weights for {', '.join(missing[:4])}: expected a checkpoint "
            f"fine-tuned for --mode {mode}"
        )
    return model.eval()


def make_example(model: Any, batch: int, length: int, device: str) -> Example:
    """Return a ragged batch of random ids: the first text fills the length, the others get shorter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    lengths = torch.tensor([max(1, length * (batch - i) // batch) for i in range(batch)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    types = ((torch.arange(length) >= lengths[:, None] // 2).long() * mask) % model.config.type_vocab_size
    return Example((ids * mask).to(device), mask.to(device), types.to(device))


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    """Return the logits of a traced or a Hugging Face model as a tuple."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(output if isinstance(output, tuple) else output.to_tuple())


@torch.no_grad()
def measure_difference(traced: Any, model: Any, mode: str, example: Example) -> float:
    """Return the largest difference of logits on real tokens, with and without token types.

    It is relative to the checkpoint's largest logit where that is above 1.
    """
    worst = 0.0
    for extra in ({}, {"token_type_ids": example.token_type_ids}):
        expected = as_tuple(model(example.input_ids, attention_mask=example.attention_mask, **extra))
        got = as_tuple(traced(example.input_ids, example.attention_mask, *extra.values()))
        for ours, theirs in zip(got, expected, strict=True):
            difference = (ours.float() - theirs.float()).abs()
            if mode != "sequence_classification":  # (B, S) or (B, S, C): padding has no answer to compare
                difference = difference[example.attention_mask.bool()]
            scale = theirs.float().abs().max().clamp(min=1.0)
            worst = max(worst, (difference.max() / scale).item())
    return worst


@torch.no_grad()
def record_answers(model: Any, example: Example) -> RecordedAnswers:
    """What the checkpoint's own forward gives for a batch, with and without token types."""
    ids, mask, types = example.input_ids, example.attention_mask, example.token_type_ids
    typed = as_tuple(model(ids, attention_mask=mask, token_type_ids=types))
    return RecordedAnswers((ids, mask, types), typed, as_tuple(model(ids, attention_mask=mask)))


def trace_checkpoint(
    model: Any,
    mode: str,
    output: Path,
    *,
    batch_size: int = 1,
    max_length: int = 128,
    data_type: str = "fp32",
    remove_padding: bool = True,
    plain: bool = False,
    device: str = "cpu",
) -> float:
    """Write one TorchScript file, after proving on an example that it equals the checkpoint.

    Args:
        model: A Hugging Face BERT with the head of `mode`, in eval mode.
        mode: sequence_classification, question_answering or token_classification.
        output: The file to write, atomically.
        batch_size: Texts in the example of the proof.
        max_length: Longest input that the file will accept.
        data_type: fp32, fp16 or bf16.
        remove_padding: Compute real tokens alone.
        plain: Plain TorchScript without the library.
        device: Where to trace; the file holds no device and loads on any.

    Returns:
        The largest difference of the file's logits to the checkpoint's in the same dtype, as measure_difference says.

    Raises:
        TraceError: The difference exceeds TOLERANCES.
    """
    model = model.to(device=device, dtype=DTYPES[data_type])
    scripted = torch.jit.script(convert_model(model, mode, max_length, remove_padding=remove_padding, plain=plain))
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    # A small batch: it is answered again at every load of an archive.
    answers = record_answers(model, make_example(model, RECORDED_TEXTS, min(max_length, RECORDED_TOKENS), device))
    torch.jit.save(scripted, str(partial), _extra_files={ANSWERS_FILE: answers.to_bytes()})
    try:
        loaded = torch.jit.load(str(partial), map_location=device)
        difference = measure_difference(loaded, model, mode, make_example(model, batch_size, max_length, device))
        if not difference <= TOLERANCES[data_type]:
            raise TraceError(
                f"the traced file differs from the checkpoint by {difference:.3g}, more than "
                f"{TOLERANCES[data_type]:g} for {data_type}; nothing was written"
            )
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def save_tokenizer(name: str, folder: Path, do_lower_case: bool | None) -> None:
    """Write the tokenizer's files beside the traced one; --do_lower_case overrides the checkpoint's own setting."""
    from transformers import AutoTokenizer

    options = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options).save_pretrained(folder)


def run(options: argparse.Namespace) -> str:
    """Do what the options ask; return one line about it."""
    if options.batch_size < 1:
        raise TraceError(f"--batch_size: expected 1 or more, got {options.batch_size}")
    model = load_checkpoint(options.model_name_or_path, options.mode, options.max_seq_length)
    if options.model_type == "ori":
        model = model.to(device=options.device, dtype=DTYPES[options.data_type])
        example = make_example(model, options.batch_size, options.max_seq_length, options.device)
        with torch.no_grad():
            outputs = as_tuple(model(example.input_ids, attention_mask=example.attention_mask))
        return f"checkpoint runs: {', '.join(str(tuple(o.shape)) for o in outputs)}; model type ori writes nothing"
    if options.model_type == "thsext":
        path = ensure_library() if options.ths_path == LIBRARY else options.ths_path
        load_ft_library(path)
    difference = trace_checkpoint(
        model,
        options.mode,
        options.output,
        batch_size=options.batch_size,
        max_length=options.max_seq_length,
        data_type=options.data_type,
        remove_padding=options.remove_padding,
        plain=options.model_type == "ths",
        device=options.device,
    )
    if options.tokenizer_name:
        save_tokenizer(options.tokenizer_name, options.output.parent, options.do_lower_case)
    return f"{options.output}: equal to the checkpoint within {difference:.2g} ({options.data_type})"


def trace_asked(options: argparse.Namespace) -> int:
    """Trace from the command line; 1 if it can't be done."""
    try:
        print(run(options))
    except (EnsembleError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
