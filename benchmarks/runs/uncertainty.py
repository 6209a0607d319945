"""Members and inputs unlike digits -> how well each score tells them from digits."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.measuring.measure import describe_machine, use_threads, write_json
from quality.scores import combine, measure_auroc
from training.runs.evaluate import find_members
from training.runs.mnist import TrainingSettings, predict_log_probabilities, train_member
from training.runs.mnist_data import REPOSITORY, SAMPLE_DIR, DataError, Digits, load_digits, normalise
from vmap_ensemble import Ensemble
from vmap_ensemble.archive.checkpoints import read_state_dict
from vmap_ensemble.core.aggregate import ClassPrediction
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.models.mnist import MnistNet

PICTURE = REPOSITORY / "data" / "images" / "sample.jpg"
SIDE, LARGEST_PATCH = 28, 224
FALSE_ALARMS = 0.05
# Of the vmapped forward to the plain loop over members, in log-probabilities.
TOLERANCE = 1e-3
BATCH = 500
# Mutual information is spread over orders of magnitude; what is below the first edge counts in the first bin.
LEAST_NATS, BINS = 1e-6, 40


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise with each image's own grey values: (N, 28, 28) uint8 -> the same, pixels in other places."""
    places = torch.rand(len(images), SIDE * SIDE, generator=generator).argsort(1)
    return images.flatten(1).gather(1, places).view_as(images)


def cut_patches(picture: Path, count: int, generator: torch.Generator) -> Tensor:
    """Random squares of 28 to 224 pixels of a picture in grey, each scaled down: (count, 28, 28) uint8."""
    with Image.open(picture) as opened:
        grey = opened.convert("L")
    patches = []
    for _ in range(count):
        side = int(torch.randint(SIDE, min(LARGEST_PATCH, *grey.size) + 1, (), generator=generator))
        left, top = (int(torch.randint(0, size - side + 1, (), generator=generator)) for size in grey.size)
        box = (left, top, left + side, top + side)
        small = grey.resize((SIDE, SIDE), Image.Resampling.BOX, box=box)
        patches.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIDE, SIDE))
    return torch.stack(patches)


def overlay_digits(digits: Digits, generator: torch.Generator) -> Tensor:
    """Each digit with one of another label drawn over it: (N, 28, 28) uint8."""
    order = torch.stack([torch.randperm(len(digits), generator=generator) for _ in range(8)])
    differs = digits.labels[order] != digits.labels
    # The first of eight random partners that has another label; the chance that none has is one in a hundred million.
    partner = order.gather(0, differs.int().argmax(0, keepdim=True))[0]
    return torch.maximum(digits.images, digits.images[partner])


def make_unlike(digits: Digits, seed: int) -> dict[str, Tensor]:
    """Title -> as many inputs unlike digits as there are digits, (N, 28, 28) uint8, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise: a digit's pixels in random places": shuffle_pixels(digits.images, generator),
        "squares of a picture": cut_patches(PICTURE, len(digits), generator),
        "two digits over one another": overlay_digits(digits, generator),
    }


def save_unlike(digits: Digits, seed: int, folder: Path) -> None:
    """Write the unlike inputs as PNG files, a folder a kind: `vmap-ensemble distil --unlike` and others read them."""
    for title, images in make_unlike(digits, seed).items():
        kind = folder / title.partition(":")[0].replace(" ", "_")
        kind.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            Image.fromarray(image.numpy()).save(kind / f"{index}.png")


def get_members(files: list[Path], settings: TrainingSettings, count: int, seed: int) -> list[MnistNet]:
    """Read the members of files, or train some on the repository's sample where no file is given."""
    if not files:
        train = load_digits(SAMPLE_DIR, "train")
        return [train_member(train, seed + index, settings, lambda *_: None) for index in range(count)]
    members = []
    for file in files:
        member = MnistNet()
        member.load_state_dict(read_state_dict(file))
        members.append(member.eval())
    return members


def predict(ensemble: Ensemble, images: Tensor) -> Tensor:
    """(N, 28, 28) uint8 -> (M, N, 10) log-probabilities of all members, by the one vmapped forward."""
    return torch.cat([ensemble.outputs(normalise(rows)) for rows in images.split(BATCH)], dim=1).float()


def score_inputs(outputs: Tensor) -> dict[str, Tensor]:
    """Name -> (M or 1, N): how unlike the inputs seem, higher is stranger; of a single member a row each."""
    combined: ClassPrediction = combine(outputs)
    return {
        "mutual_information": combined.mutual_information[None],
        "predictive_entropy": combined.predictive_entropy[None],
        "ensemble_probability": 1 - combined.probabilities.amax(-1)[None],
        # Of the logarithm: the same order as 1 - p, without the ties of probabilities that round to 1.
        "member_probability": -outputs.amax(-1),
    }


def find_share(known: Tensor, unlike: Tensor, false_alarms: Tensor) -> Tensor:
    """Share of unlike inputs above the thresholds that these shares of known ones are above: (F,) -> (F,)."""
    thresholds = torch.quantile(known.double(), 1 - false_alarms.double())
    return (unlike.double()[None] > thresholds[:, None]).double().mean(1)


def judge(known: dict[str, Tensor], unlike: dict[str, Tensor], grid: Tensor) -> list[dict[str, Any]]:
    """One row a score: AUROC and share found, means over members with the least and greatest; and its ROC curve."""
    rows = []
    for name in known:
        pairs = list(zip(known[name], unlike[name], strict=True))
        areas = [measure_auroc(*pair) for pair in pairs]
        found = [find_share(*pair, torch.tensor([FALSE_ALARMS])).item() for pair in pairs]
        curves = torch.stack([find_share(*pair, grid) for pair in pairs])
        rows.append({
            "score": name, "auroc": sum(areas) / len(areas), "least_auroc": min(areas), "greatest_auroc": max(areas),
            "found": sum(found) / len(found), "least_found": min(found), "greatest_found": max(found),
            "curve": [round(share, 4) for share in curves.mean(0).tolist()],
        })  # fmt: skip
    return rows


def describe_scores(title: str, information: Tensor, edges: Tensor) -> dict[str, Any]:
    """Quantiles and histogram of the mutual information of one kind of inputs."""
    low, middle, high = torch.quantile(information, torch.tensor([0.1, 0.5, 0.9])).tolist()
    counts = torch.histogram(information.clamp(edges[0], edges[-1]), edges).hist
    return {
        "inputs": title, "count": len(information), "histogram": [int(count) for count in counts],
        "p10_nats": low, "median_nats": middle, "p90_nats": high,
    }  # fmt: skip


def measure(members: list[MnistNet], digits: Digits, seed: int) -> dict[str, Any]:
    """All figures: of held-out digits, and of each kind of unlike inputs against them.

    Args:
        members: trained.
        digits: held out.
        seed: of the unlike inputs.
    """
    states = {f"m{index}": member.state_dict() for index, member in enumerate(members)}
    ensemble = Ensemble.of(MnistNet(), states, example=normalise(digits.images[:BATCH]))
    outputs = predict(ensemble, digits.images)
    loop = torch.stack([predict_log_probabilities(member, digits) for member in members])
    difference = (outputs - loop).abs().max().item()
    right = outputs.argmax(-1) == digits.labels
    combined = combine(outputs)
    known = score_inputs(outputs)
    edges = torch.logspace(math.log10(LEAST_NATS), math.log10(math.log(max(2, len(members)))), BINS + 1)
    grid = torch.linspace(0, 1, 41).square()  # finer where few digits are refused
    kinds = []
    for title, images in make_unlike(digits, seed).items():
        unlike = score_inputs(predict(ensemble, images))
        rows = judge(known, unlike, grid)
        kinds.append({**describe_scores(title, unlike["mutual_information"][0], edges), "scores": rows})
    return {
        "members": len(members), "member_accuracy": right.float().mean().item(),
        "ensemble_accuracy": (combined.ranking[:, 0] == digits.labels).float().mean().item(),
        "largest_difference": difference, "equal": difference <= TOLERANCE, "false_alarms": FALSE_ALARMS,
        "threshold_nats": torch.quantile(known["mutual_information"][0], 1 - FALSE_ALARMS).item(),
        "edges_nats": edges.tolist(), "false_alarm_grid": grid.tolist(),
        "digits": describe_scores("held-out digits", known["mutual_information"][0], edges), "unlike": kinds,
    }  # fmt: skip


def print_figures(figures: dict[str, Any]) -> None:
    """Print the areas and shares for people."""
    print(
        f"{figures['members']} members: accuracy {figures['member_accuracy']:.2%} each on average, "
        f"{figures['ensemble_accuracy']:.2%} together; mutual information of digits "
        f"{figures['digits']['median_nats']:.4f} nats (median)"
    )
    for kind in figures["unlike"]:
        print(f"\n{kind['inputs']}: mutual information {kind['median_nats']:.4f} nats (median)")
        for row in kind["scores"]:
            print(f"  {row['score']:22} AUROC {row['auroc']:.4f}   found {row['found']:.1%}")


def run(options: argparse.Namespace) -> int:
    """Train or read, measure and print; 1 where the vmapped forward differs from the loop, 2 for wrong arguments."""
    use_threads(options.threads)
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    settings = TrainingSettings(epochs=options.epochs)
    try:
        files = find_members(options.members) if options.members else []
        members = get_members(files, settings, options.num_models, options.seed)
        test = load_digits(SAMPLE_DIR, "test")
        digits = Digits(test.images[: options.images], test.labels[: options.images])
        if options.save_unlike:
            save_unlike(digits, options.seed, options.save_unlike)
        figures = measure(members, digits, options.seed)
    except (DataError, EnsembleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_figures(figures)
    if options.json:
        trained = None if files else {"epochs": options.epochs, "images": len(load_digits(SAMPLE_DIR, "train"))}
        write_json(options.json, machine, [], table="uncertainty", trained=trained, **figures)
    if not figures["equal"]:
        print(f"error: the forward differs from the loop by {figures['largest_difference']:.1e}", file=sys.stderr)
    return 0 if figures["equal"] else 1
