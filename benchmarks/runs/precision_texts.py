"""Members of an encoder of texts in float32 and int8, ours and ONNX Runtime's -> tables of agreement and times."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.measuring.int8_engines import onnxruntime_dynamic
from benchmarks.measuring.measure import make_session
from benchmarks.measuring.networks import states_of
from benchmarks.measuring.precisions import Agreement, drop_hopeless, figures_of, show, time_for, time_table
from benchmarks.measuring.vmap_comparison import perturb
from benchmarks.runs.bert_vmap import Inputs, find_default_model, make_batches
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.encoders.forward import PackedEncoderForward
from vmap_ensemble.encoders.prepared import PreparedEncoder
from vmap_ensemble.encoders.quantised import QuantisedEncoderForward
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.execution.quiet import quietly

CLASSES, LENGTH = 8, 128
UNSEEN = [5, 9, 15, 24, 40, 64, 96, 128] * 4  # tokens of the texts that outputs are compared on
BASES = ("fp32 loop", "fp32 ours", "int8 ONNX Runtime")
Forward = Callable[[Inputs], Tensor]


class Logits(nn.Module):
    """A member with a tensor as its output, which exporters want."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) ids and mask -> (B, C) logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def build_classifiers(folder: Path, count: int) -> list[PreTrainedModel]:
    """Classifiers on the encoder of a folder: the first one's as stored, the others' perturbed; heads are random."""
    config = AutoConfig.from_pretrained(folder, num_labels=CLASSES)
    stored = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(perturb(stored, seed) if seed else stored)
        head = model.classifier.weight
        head.copy_(nn.functional.normalize(torch.randn_like(head)))
        members.append(model.eval())
    return members


def export(model: nn.Module) -> bytes:
    """A member as an ONNX model for batches of any size."""
    example = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long))
    batch, width = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    with quietly():
        program = torch.onnx.export(
            Logits(model).eval(),  # type: ignore[arg-type]
            example,
            input_names=["ids", "mask"],
            dynamic_shapes=({0: batch, 1: width}, {0: batch, 1: width}),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise EnsembleError("ONNX Runtime: the exporter returned no program")
    proto = program.model_proto
    proto.graph.ClearField("value_info")  # shapes that quantising changes, and then refuses
    return proto.SerializeToString()


def run_sessions(sessions: Sequence[Any]) -> Forward:
    """ONNX Runtime's sessions, one a member, one after another."""

    def forward(inputs: Inputs) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(("ids", "mask"), inputs, strict=True)}
        return torch.stack([torch.from_numpy(session.run(None, feed)[0]) for session in sessions])

    return forward


def build_forwards(models: list[PreTrainedModel], inputs: Inputs, folder: Path) -> dict[str, Forward]:
    """Rival -> its forward; what can't be had here is left out with a line that says why."""
    members = stack_members(states_of([*models]))

    def loop() -> Forward:
        return lambda inputs: torch.stack([model(*inputs).logits for model in models])

    def prepared() -> Forward:
        run = PreparedEncoder(PackedEncoderForward(copy.deepcopy(models[0]), members), inputs)
        return lambda inputs: run(*inputs).logits

    def quantised() -> Forward:
        run = QuantisedEncoderForward(copy.deepcopy(models[0]), members, inputs)
        return lambda inputs: run(*inputs).logits

    def onnxruntime() -> Forward:
        return run_sessions([make_session(export(model), torch.get_num_threads()) for model in models])

    def onnxruntime_int8() -> Forward:
        return run_sessions(onnxruntime_dynamic(models, export, folder))

    builders = {
        "fp32 loop": loop,
        "fp32 ours": prepared,
        "fp32 ONNX Runtime": onnxruntime,
        "int8 ours": quantised,
        "int8 ONNX Runtime": onnxruntime_int8,
    }
    forwards = {}
    for name, build in builders.items():
        try:
            forwards[name] = build()
        except EnsembleError as error:
            print(f"{name} is left out: {error}")
    return forwards


def measure_texts(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the encoder's members on each batch of texts, print the tables, and return the figures."""
    encoder = find_default_model()
    models = build_classifiers(encoder, options.count)
    batches = make_batches(encoder, LENGTH)
    forwards = build_forwards(models, batches["single"], folder)
    outputs = {name: _logits(forward, models[0].config.vocab_size) for name, forward in forwards.items()}
    agreements = {name: Agreement.of(outputs["fp32 loop"], output) for name, output in outputs.items()}
    print(f"{encoder.name}, {len(models)} members, {len(UNSEEN)} texts compared")
    figures: dict[str, Any] = {"members": len(models), "times": {}}
    for name in options.texts:
        ids, mask = batches[name]
        width = int(mask.sum(1).max())
        inputs = (ids[:, :width].contiguous(), mask[:, :width].contiguous())
        runs = {rival: lambda forward=forward, inputs=inputs: forward(inputs) for rival, forward in forwards.items()}
        kept, round_ms = drop_hopeless(runs, "fp32 loop")
        timings = time_for(kept, round_ms, options.seconds)
        bases = [base for base in BASES if base in kept]
        title = f"{name}: {int(mask.sum())} tokens in {len(mask)} texts"
        show(time_table(title, timings, agreements, bases), options.markdown)
        figures["times"][name] = figures_of(timings, agreements)
    return figures


def _logits(forward: Forward, vocabulary: int) -> Tensor:
    """(M, texts, C): of texts of random tokens, the same for every rival; one by one, so that nothing is padded."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for length in UNSEEN:
        ids = torch.randint(1000, vocabulary, (1, length), generator=generator)
        outputs.append(forward((ids, torch.ones_like(ids))))
    return torch.cat(outputs, dim=1)
