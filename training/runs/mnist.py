"""Digits and a seed -> a trained member; what `python -m training.mnist` does once its options are read."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.options import TrainingSettings
from training.runs.mnist_data import (
    SAMPLE_DIR,
    DataError,
    Digits,
    load_digits,
    normalise,
    resolve_folder,
)
from vmap_ensemble.models.mnist import MnistNet


def train_member(
    digits: Digits, seed: int, settings: TrainingSettings, report: Callable[[int, float], None]
) -> MnistNet:
    """Train one member from scratch.

    Args:
        digits: the training images.
        seed: of this member. torch's global generator is seeded with it.
        settings: how to train.
        report: called after every step with the number of images seen in it and its loss.

    Returns:
        The trained network, on the CPU and in evaluation mode.
    """
    torch.manual_seed(seed)
    # channels_last trained about twice as many images a second at batch 64 on a CPU.
    model = MnistNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(digits) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.2
    )
    model.train()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(digits)).split(settings.batch_size):
            images = normalise(digits.images[rows]).contiguous(memory_format=torch.channels_last)
            loss = F.nll_loss(model(images), digits.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report(len(rows), loss.item())
    return model.eval()


@torch.inference_mode()
def predict_log_probabilities(model: MnistNet, digits: Digits, batch_size: int = 500) -> Tensor:
    """Run one member over a split; returns (N, 10) float32 log-probabilities."""
    return torch.cat([model(normalise(images)) for images in digits.images.split(batch_size)])


def measure_accuracy(model: MnistNet, digits: Digits) -> float:
    """Share of the split that one member gets right, 0 to 1."""
    return (predict_log_probabilities(model, digits).argmax(1) == digits.labels).float().mean().item()


def save_state_dict(model: MnistNet, path: Path) -> None:
    """Write a state dict as the MNIST example does, and atomically: a reader sees a whole file or none."""
    # Back to the usual memory format, so that a reader gets the tensors that the example would write.
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # No mkstemp: its files can be read by their owner alone.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(state, draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def train_members(
    train: Digits, test: Digits, seeds: range, settings: TrainingSettings, output_dir: Path | None
) -> list[float]:
    """Train one member a seed, with a progress bar, and write each as soon as it is done.

    Args:
        train: what to train on.
        test: what to report accuracy on.
        seeds: one member each.
        settings: how to train each.
        output_dir: gets mnist-seed<seed>.pt; None writes nothing.

    Returns:
        The test accuracy of each member, 0 to 1.
    """
    accuracies = []
    images_per_member = settings.epochs * len(train)
    with tqdm(
        total=len(seeds) * images_per_member,
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    ) as bar:
        for position, seed in enumerate(seeds, start=1):
            seen = 0

            def report(count: int, loss: float, position: int = position) -> None:
                nonlocal seen
                seen += count
                epoch = min(settings.epochs, 1 + (seen - 1) // len(train))
                bar.set_description(f"member {position}/{len(seeds)} epoch {epoch}/{settings.epochs}", refresh=False)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update(count)

            model = train_member(train, seed, settings, report)
            accuracies.append(measure_accuracy(model, test))
            line = f"seed {seed}: {accuracies[-1]:.2%} of {len(test)} test images"
            if output_dir is not None:
                path = output_dir / f"mnist-seed{seed}.pt"
                save_state_dict(model, path)
                line += f" -> {path}"
            bar.write(line)
    return accuracies


def open_data(data_dir: Path | None, download: bool) -> tuple[Path, Digits, Digits]:
    """Load both splits and say in one line which data it is; returns the folder, train and test."""
    folder = resolve_folder(SAMPLE_DIR if data_dir == Path("sample") else data_dir, download)
    train, test = load_digits(folder, "train"), load_digits(folder, "test")
    note = " (the repository's sample; --download or --data-dir for the full set)" * (folder == SAMPLE_DIR)
    print(f"data: {len(train)} training and {len(test)} test images of {folder}{note}")
    return folder, train, test


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        _, train, test = open_data(options.data_dir, options.download)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = TrainingSettings(options.epochs, options.batch_size, options.lr)
    seeds = range(options.seed, options.seed + options.num_models)
    start = time.perf_counter()
    train_members(train, test, seeds, settings, options.output_dir if options.save_model else None)
    print(f"trained {len(seeds)} members in {time.perf_counter() - start:.0f} s")
    if not options.save_model:
        print("nothing was written; --save-model writes the members")
    return 0
