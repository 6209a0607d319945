"""Every handler's networks, each mode and dtype -> whether the ensemble's outputs are its members' own, in process.

No TorchServe and no archive: the same forwards, built and proved as a worker builds them, and asked once more on a
batch of another size, whose texts have other lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.measuring.networks import NETWORKS, Args, Network, build_members, image_network, states_of
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers, stack_members
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.errors import first_line
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.modes import ExecutionOptions
from vmap_ensemble.execution.timing import Budget
from vmap_ensemble.process.device import DTYPES

MEMBERS = 2
AUTO_S = 1.0
IMAGE_MODES = ("reference", "eager", "cudagraph", "cudagraph_loop", "branches", "auto", "prepared")
TEXT_MODES = (*IMAGE_MODES[:-1], "cudagraph_fused")
COMPILED = ("compiled", "compiled_branches")
# Handler's mode -> class of transformers.
HEADS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "fill_mask": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}
SHAPE: dict[str, Any] = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128, "max_position_embeddings": 64}  # fmt: skip
LENGTHS = {1: [9], 5: [1, 40, 5, 5, 12], 3: [33, 7, 20]}


@dataclass(frozen=True)
class Case:
    """What a handler serves: its name, a network of its kind, and the ways to run that on a GPU."""

    handler: str
    network: Network
    modes: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Of all handlers that run their members as one forward."""
    yield Case("mnist_handler", NETWORKS["mnist"], (*IMAGE_MODES, *COMPILED))
    yield Case("resnet_handler", image_network("resnet18", 64), IMAGE_MODES)
    for mode, name in HEADS.items():
        yield Case(f"bert_handler: {mode}", Network(mode, _make_head(name), _make_texts, _join), TEXT_MODES)


def _make_head(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = transformers.BertConfig(**SHAPE)
        return getattr(transformers, name).from_config(config).eval()

    return build


def _make_texts(batch: int) -> Args:
    mask = (torch.arange(max(LENGTHS[batch])) < torch.tensor(LENGTHS[batch])[:, None]).long()
    return torch.randint(5, SHAPE["vocab_size"], mask.shape) * mask, mask


def _join(model: Any, members: StackedMembers) -> EnsembleForward:
    from vmap_ensemble.encoders.build import build_encoder_forward  # here: it imports transformers

    return build_encoder_forward(model, members)


def check_all(
    device: torch.device, dtypes: Sequence[str], budget: Budget, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Check each case, dtype and mode for which time is left, and print what is wrong.

    Args:
        device: Where.
        dtypes: As settings name them.
        budget: What is left at its end isn't checked, and says so.
        names: These modes alone; all by default.

    Returns:
        Rows: handler, dtype, mode, what serves, the largest difference to the members' own, seconds, and the error.
    """
    rows = []
    for case in cases():
        for dtype in dtypes:
            for mode in case.modes:
                if (names and mode not in names) or (mode in COMPILED and dtype != dtypes[0]):
                    continue
                row: dict[str, Any] = {"handler": case.handler, "dtype": dtype, "mode": mode}
                late = {"error": f"not checked: {budget.seconds:.0f} s were spent before its turn"}
                rows.append({**row, **(late if budget.left_s <= 0 else check(case, DTYPES[dtype], mode, device))})
                print_row(rows[-1])
    return rows


@torch.inference_mode()
def check(case: Case, dtype: torch.dtype, mode: str, device: torch.device) -> dict[str, Any]:
    """Build one way, and compare it with the members on batches of 1, 5 and 3 examples."""
    started = time.perf_counter()
    try:
        states = states_of(build_members(case.network, MEMBERS))
        forward = case.network.join(case.network.build(), stack_members(states, device, dtype))
        small, large, other = (_place(case.network.make_args(batch), device, dtype) for batch in (1, 5, 3))
        run = build_execution(mode, forward, [small, large], ExecutionOptions(budget_s=AUTO_S))
        differences = [prove_equal(forward, run, args).largest_difference for args in (small, large, other)]
        found = {"serves": run.name, "largest_relative_difference": max(differences), "error": None}
    except Exception as error:  # whatever a kernel or a model may raise is what is asked for here
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    return {**found, "seconds": time.perf_counter() - started}


def _place(args: Args, device: torch.device, dtype: torch.dtype) -> Args:
    return tuple(arg.to(device, dtype if arg.is_floating_point() else None) for arg in args)


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    told = row["error"] or f"{row['largest_relative_difference']:.1e}, {row['serves']} serves, {row['seconds']:.1f} s"
    print(f"{row['handler']:38}{row['dtype']:6}{row['mode']:19}{told}", flush=True)
