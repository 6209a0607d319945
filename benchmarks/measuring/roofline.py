"""A network and a batch -> the least time that this machine could need for it, from ceilings measured here.

No run that computes as the network is written can be faster than its floating point operations at the speed of a
large matrix product (or of a large 1x1 convolution, the same product in another library), nor than reading its
members' weights once at the speed of a large copy. Activations are not counted, so the bound is a low one. Weights
that stay in a cache between calls can be read faster than the memory gives them, those that meet a 0 needn't be read,
and Winograd's convolutions multiply less: such runs can fall below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.measure import synchronise
from benchmarks.measuring.networks import Args, parameter_bytes, to_tensor, without_padding

TRIAD_ELEMENTS = 32 * 2**20  # 128 MiB a tensor in float32: beyond any cache
MATRIX_SIDE = 2048
GPU_MATRIX_SIDE = 8192
REPEATS = 10
MOST_CALL_S = 1.0


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached, in this process with its threads.

    Attributes:
        bytes_per_s: of a = b + 2c over large tensors, three tensors moved.
        flops_per_s: of a large matrix product or 1x1 convolution, whichever is faster; two operations per
            multiply-add.
    """

    bytes_per_s: float
    flops_per_s: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of both measurements: a disturbed one is too low."""
        return Ceilings(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    elements: int = TRIAD_ELEMENTS,
    side: int | None = None,
    repeats: int = REPEATS,
) -> Ceilings:
    """Measure both ceilings; the best of some runs, since a ceiling is what can be had."""
    side = side or find_side(device, dtype)
    a, b, c = (torch.ones(elements, device=device, dtype=dtype) for _ in range(3))
    triad_s = _best_s(lambda: torch.add(b, c, alpha=2.0, out=a), device, repeats)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    matrix_s = _best_s(lambda: torch.mm(left, right), device, repeats)
    # The same product with the positions of an image as rows: on some processors oneDNN beats the BLAS of torch.mm.
    image = right.reshape(1, side, side // 32, 32).to(memory_format=torch.channels_last)
    filters = left.reshape(side, side, 1, 1)
    convolution_s = _best_s(lambda: torch.conv2d(image, filters), device, repeats)
    return Ceilings(3 * a.element_size() * elements / triad_s, 2 * side**3 / min(matrix_s, convolution_s))


def find_side(device: torch.device, dtype: torch.dtype) -> int:
    """Side of a matrix product that is large, and takes no longer than `MOST_CALL_S`.

    A CPU without instructions for half precision multiplies a thousand times slower than one with them.
    """
    most = GPU_MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE
    side = most // 8
    while side < most:
        square = torch.ones(side, side, device=device, dtype=dtype)
        if 8 * _best_s(lambda x=square: torch.mm(x, x), device, 1) > MOST_CALL_S:  # type: ignore[misc]
            break
        side *= 2
    return side


def _best_s(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times_s = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s[1:])  # the first one pays for pages and threads


@dataclass(frozen=True)
class Work:
    """What one call of an ensemble has to do at least.

    Attributes:
        flops: of all members on the batch, counted by torch in a plain forward.
        bytes: of all members' parameters, the inputs and the outputs; of an embedding one row per token.
    """

    flops: float
    bytes: float

    def bound_ms(self, ceilings: Ceilings) -> float:
        """The least time in ms: whichever of both takes longer."""
        return 1e3 * max(self.flops / ceilings.flops_per_s, self.bytes / ceilings.bytes_per_s)

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Counts, ceilings and the bound."""
        limited_by = (
            "arithmetic" if self.flops / ceilings.flops_per_s > self.bytes / ceilings.bytes_per_s else "memory"
        )
        return {**asdict(self), **asdict(ceilings), "bound_ms": self.bound_ms(ceilings), "limited_by": limited_by}


def add_roofline(cell: dict[str, Any], ceilings: Ceilings) -> None:
    """Write the bound into a cell of `forward`, and each row's distance to it."""
    if "work" in cell:
        work = Work(cell["work"]["flops"], cell["work"]["bytes"])
        cell["work"] = work.to_json(ceilings)
        for row in cell["rows"]:
            if "median_ms" in row:
                row["times_roofline"] = row["median_ms"] / cell["work"]["bound_ms"]


@torch.no_grad()
def count_work(network: nn.Module, args: Args, members: int) -> Work:
    """Count one member's plain forward of what isn't padding, times the members."""
    parts = without_padding(args)
    with FlopCounterMode(display=False) as counter:
        outputs = [to_tensor(network(*part)) for part in parts]
    sizes = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)
    given = sum(output.numel() * output.element_size() for output in outputs)
    own = read_bytes(network, sum(part[0].numel() for part in parts)) + given
    return Work(members * float(counter.get_total_flops()), members * own + sizes)


def read_bytes(network: nn.Module, tokens: int) -> int:
    """Bytes of a member's parameters that a forward reads: of an embedding's rows no more than there are tokens."""
    unread = 0
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            rows = max(0, module.num_embeddings - tokens)
            unread += rows * module.embedding_dim * module.weight.element_size()
    return parameter_bytes(network) - unread
