"""Members and one image -> how long they take one after another, and as one vmapped ensemble.

Shared by `python -m benchmarks.mnist_vmap` and `python -m benchmarks.resnet_vmap`, which say only what
network it is and how an image becomes its input.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from benchmarks.measuring.measure import describe_machine, measure_interleaved, print_timings, write_json
from vmap_ensemble.archive.checkpoints import find_checkpoints, read_state_dict
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.errors import EnsembleError, MemberError
from vmap_ensemble.process.memory import keep_freed_memory

# Relative to the largest output. Sums in float32 in another order differ by a few units in the last place
# per layer; 1e-5 is what the project promises, and a wrong weight or statistic is far beyond it.
TOLERANCE = 1e-5
# Of a parameter's own deviation: enough to tell members apart, too little to spoil a trained network.
PERTURBATION = 0.02
State = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        title: name of the network.
        build: makes one member with fresh weights, from torch's global generator.
        read_image: one picture -> (1, ...) float32 input.
        to_probabilities: (B, C) outputs -> (B, C) probabilities.
        labels: C names.
        model_path: checkpoints to use by default, where they are there.
    """

    title: str
    build: Callable[[], nn.Module]
    read_image: Callable[[Image.Image], Tensor]
    to_probabilities: Callable[[Tensor], Tensor]
    labels: list[str]
    model_path: Path | None = None


def perturb(state: Mapping[str, Tensor], seed: int) -> State:
    """Copy a state dict with seeded noise on its parameters, in proportion to their own deviation.

    Buffers of batch norm stay as they are: a variance must not become negative. So do integers.
    """
    generator = torch.Generator().manual_seed(seed)
    return {key: _perturb_tensor(key, value, generator) for key, value in state.items()}


def _perturb_tensor(key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point() or key.rpartition(".")[2] in ("running_mean", "running_var"):
        return value.clone()
    noise = torch.randn(value.shape, generator=generator).to(value.dtype)
    return value + PERTURBATION * value.std(correction=0) * noise


def gather_states(subject: Subject, model_path: list[Path] | None, count: int) -> tuple[dict[str, State], str]:
    """Get one state dict a member.

    Args:
        subject: what is compared.
        model_path: as --model_path.
        count: members wanted.

    Returns:
        Name -> state dict, and a line that says where they are from.

    Raises:
        MemberError: a checkpoint is missing or can't be read.
    """
    trained = subject.model_path
    if model_path is None and trained is not None and trained.is_dir() and any(trained.iterdir()):
        model_path = [trained]
    if model_path is None:
        states = {}
        for seed in range(count):
            torch.manual_seed(seed)
            states[f"fresh-{seed}"] = dict(subject.build().state_dict())
        return states, "seeded fresh weights, not trained: times are real, predictions mean nothing"
    files = find_checkpoints(model_path)[:count]
    states = {f"{index}-{file.stem}": read_state_dict(file) for index, file in enumerate(files)}
    sources = list(states.values())
    for extra in range(len(files), count):
        states[f"{extra}-perturbed"] = perturb(sources[extra % len(sources)], seed=extra)
    copies = f" and {count - len(files)} perturbed copies" if count > len(files) else ""
    return states, ", ".join(file.name for file in files) + copies


def build_members(subject: Subject, states: Mapping[str, State], device: torch.device) -> list[nn.Module]:
    """Load each state dict into a module of its own, in evaluation mode.

    Raises:
        MemberError: a state dict does not fit the network.
    """
    members = []
    for name, state in states.items():
        model = subject.build()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise MemberError(f"member '{name}' does not fit {subject.title}: {error}") from error
        members.append(model.to(device).eval())
    return members


def read_image(path: Path) -> Image.Image:
    """Open a picture.

    Raises:
        EnsembleError: it is missing, or no picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise EnsembleError(f"--image_path {path}: expected a picture, got: {error}") from error


def compare_outputs(ours: Tensor, reference: Tensor) -> dict[str, float | bool]:
    """Compare (M, B, C) outputs; relative means relative to the reference's largest value."""
    difference = (ours - reference).abs().max().item()
    relative = difference / max(reference.abs().max().item(), torch.finfo(reference.dtype).tiny)
    return {
        "largest_difference": difference,
        "largest_relative_difference": relative,
        "tolerance": TOLERANCE,
        "same_labels": bool((ours.argmax(-1) == reference.argmax(-1)).all()),
        "equal": relative <= TOLERANCE,  # False for nan
    }


@torch.inference_mode()
def compare(subject: Subject, options: argparse.Namespace, device: torch.device) -> int:
    """Run one comparison; returns the exit code: 1 where the numbers differ beyond the tolerance."""
    machine = describe_machine(device)
    states, source = gather_states(subject, options.model_path, options.num_models)
    modules = build_members(subject, states, device)
    ensemble = EnsembleForward(subject.build().eval(), stack_members(states, device))
    single = subject.read_image(read_image(options.image_path))
    x = single.expand(options.batch_size, *single.shape[1:]).contiguous().to(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{subject.title}, {len(modules)} members: {source}; batch of {len(x)} on {device}")

    reference = torch.stack([module(x) for module in modules])
    probability, label = subject.to_probabilities(reference[:, 0]).mean(0).max(0)
    prediction = {"label": subject.labels[int(label)], "probability": probability.item()}
    print(f"sanity: {options.image_path.name} -> {prediction['label']}, probability {probability:.4f}")
    difference = compare_outputs(ensemble(x), reference)
    print(
        f"largest difference {difference['largest_difference']:.2e}, relative "
        f"{difference['largest_relative_difference']:.2e} (tolerance {TOLERANCE:.0e}), "
        f"same labels: {difference['same_labels']}"
    )
    rivals = {
        "one after another": lambda: [module(x) for module in modules],
        "vmapped ensemble": lambda: ensemble(x),
    }
    timings = measure_interleaved(rivals, device, options.warmup, options.iterations)
    print_timings(timings)
    if options.json:
        facts = {
            "network": subject.title, "members": source, "num_models": len(modules), "batch_size": len(x),
            "warmup": options.warmup, "prediction": prediction, "difference": difference,
            "ratio_of_medians": timings[0].median_ms / timings[1].median_ms,
        }  # fmt: skip
        write_json(options.json, machine, timings, **facts)
    if not difference["equal"]:
        print("error: the vmapped ensemble differs from its members beyond the tolerance", file=sys.stderr)
        return 1
    return 0


def find_device(name: str | None) -> torch.device:
    """The device of a name; without one a GPU where there is one, else the CPU.

    Raises:
        EnsembleError: torch can't use it here.
    """
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise EnsembleError(f"--device {name}: torch can't use it here ({reason})") from error


def run_comparison(subject: Subject, options: argparse.Namespace) -> int:
    """Check the options and compare; errors become one line and exit code 2."""
    try:
        device = find_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        keep_freed_memory()  # as a worker does
        return compare(subject, options, device)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
