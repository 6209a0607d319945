"""Turns a forward into recorded CUDA graphs, one for each bucket of batch sizes: no launch costs, no Python.

A graph replays fixed addresses, so a batch is copied into static inputs of the next larger bucket and padded
with its own first row (a row that the model is known to take), and the padding is cut off the outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import LoadError

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
WARM_UP_RUNS = 3  # cuDNN and cuBLAS choose their kernels in these; that can't happen while recording
MAX_GRAPHS = 32


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Any


class CudaGraphs:
    """The forward, replayed from CUDA graphs.

    Args:
        run: Tensors (B, ...) -> tensors (M, B, ...), on one CUDA device, the same work for equal shapes.
        device: Where the members are.
        buckets: Batch sizes that are recorded, ascending. A larger batch runs without a graph.

    Raises:
        LoadError: The device isn't a CUDA device.

    Note:
        Each graph keeps its own inputs and outputs; intermediate memory is shared by all of them.
    """

    def __init__(self, run: Callable[..., Any], device: torch.device, buckets: Sequence[int] = BUCKETS) -> None:
        if device.type != "cuda":
            raise LoadError(f"execution 'cudagraph': expected the members on a CUDA device, got {device}")
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise LoadError(f"execution 'cudagraph': expected ascending batch sizes from 1, got {list(buckets)}")
        self.run, self.device, self.buckets = run, device, tuple(buckets)
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._pool: Any = None

    def __call__(self, *args: Tensor) -> Any:
        """Replay the graph of the batch's bucket; it is recorded at its first use."""
        batch = args[0].shape[0]
        bucket = next((size for size in self.buckets if size >= batch), None)
        if bucket is None:
            return self.run(*args)
        key = (bucket, *((tuple(arg.shape[1:]), arg.dtype) for arg in args))
        if key not in self._recordings:
            self._recordings[key] = self._record(bucket, args)
            if len(self._recordings) > MAX_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        for static, arg in zip(recording.inputs, args, strict=True):
            fill_static(static, arg)
        recording.graph.replay()
        # Copied: the next replay overwrites them.
        return pytree.tree_map(lambda out: out[:, :batch].clone(), recording.outputs)

    def _record(self, bucket: int, args: tuple[Tensor, ...]) -> _Recording:
        inputs = tuple(arg.new_empty((bucket, *arg.shape[1:])) for arg in args)
        for static, arg in zip(inputs, args, strict=True):
            fill_static(static, arg)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self.run(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self.run(*inputs)
        self._pool = self._pool or graph.pool()
        return _Recording(graph, inputs, outputs)


def fill_static(static: Tensor, arg: Tensor) -> None:
    """Copy a batch into a static input of at least its size; the rows behind it become its first row."""
    batch = arg.shape[0]
    static[:batch].copy_(arg)
    if batch < static.shape[0]:
        static[batch:].copy_(arg[:1].expand(static.shape[0] - batch, *arg.shape[1:]))
