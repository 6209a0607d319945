"""A name -> a network, its inputs, and how its members become one forward.

No weights are read, and every name works on a bare machine: weights are random, and inputs are noise, since times
hardly depend on their values. Where they do, members are trained here, on the repository's sample of MNIST.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.runs.mnist import TrainingSettings, train_member
from training.runs.mnist_data import SAMPLE_DIR, load_digits, normalise
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.models.mnist import MnistNet

Args = tuple[Tensor, ...]
TOKENS = 32


@dataclass(frozen=True)
class Network:
    """What is measured.

    Attributes:
        title: with its input, for readers.
        build: makes one member in eval mode from torch's global generator; called with `make_args`' tensors it
            returns (B, ...), as a tensor or as transformers' output with logits.
        make_args: batch size -> inputs.
        join: skeleton and members -> the forward as a handler joins it.
        stock: skeleton and members -> torch.func.vmap without anything of ours.
    """

    title: str
    build: Callable[[], nn.Module]
    make_args: Callable[[int], Args]
    join: Callable[[Any, StackedMembers], EnsembleForward] = EnsembleForward
    stock: Callable[[Any, StackedMembers], EnsembleForward] = EnsembleForward


def image_network(name: str, side: int = 224) -> Network:
    """One of torchvision's classifiers, on noise of side x side pixels."""

    def build() -> nn.Module:
        from torchvision.models import get_model

        return vary_statistics(get_model(name, weights=None).eval())

    return Network(f"{name}, {side}x{side}", build, lambda batch: (torch.randn(batch, 3, side, side),))


def vary_statistics(network: nn.Module) -> nn.Module:
    """Give batch norm statistics of a member's own, as training does."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return network


def trained_network() -> Network:
    """MNIST's network trained for one pass over the sample, on test digits: most values behind its relus are 0."""

    def build() -> nn.Module:
        return copy.deepcopy(_train(torch.initial_seed()))

    def make_args(batch: int) -> Args:
        return (normalise(load_digits(SAMPLE_DIR, "test").images[:batch]),)

    return Network("MNIST, trained, digits", build, make_args)


@functools.cache
def _train(seed: int) -> nn.Module:
    with torch.inference_mode(False), torch.enable_grad():
        digits = load_digits(SAMPLE_DIR, "train")
        network = train_member(digits, seed, TrainingSettings(epochs=1), lambda *seen: None)
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def encoder_network(title: str, layers: int, hidden: int, tokens: int = TOKENS) -> Network:
    """A BERT classifier of a shape, on texts of so many tokens without padding."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=12
        )
        return BertForSequenceClassification(config).eval()

    def make_args(batch: int) -> Args:
        return torch.randint(1000, 30_000, (batch, tokens)), torch.ones(batch, tokens, dtype=torch.long)

    return Network(f"{title}, {tokens} tokens", build, make_args, _join_encoder, _stock_encoder)


def _join_encoder(model: Any, members: StackedMembers) -> EnsembleForward:
    from vmap_ensemble.encoders.build import build_encoder_forward

    return build_encoder_forward(model, members)


def _stock_encoder(model: Any, members: StackedMembers) -> EnsembleForward:
    from vmap_ensemble.encoders.forward import EncoderForward

    return EncoderForward(model, members)


NETWORKS = {
    "mnist": Network("MNIST, 28x28", lambda: MnistNet().eval(), lambda batch: (torch.randn(batch, 1, 28, 28),)),
    "mnist-trained": trained_network(),
    "resnet18": image_network("resnet18"),
    "resnet50": image_network("resnet50"),
    "minilm": encoder_network("MiniLM-L6 shape", layers=6, hidden=384),
    "bert": encoder_network("bert-base shape", layers=12, hidden=768),
}


def to_tensor(output: Any) -> Tensor:
    """The tensor of an output: itself, or the logits."""
    return output if isinstance(output, Tensor) else output.logits


def build_members(network: Network, count: int) -> list[nn.Module]:
    """Members that differ in every weight, the same for the same count."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(network.build())
    return members


def states_of(networks: list[nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Name of the member -> its state dict."""
    return {f"m{index}": network.state_dict() for index, network in enumerate(networks)}


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next(network.parameters()).device


def parameter_bytes(network: nn.Module) -> int:
    """Bytes of a member's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
