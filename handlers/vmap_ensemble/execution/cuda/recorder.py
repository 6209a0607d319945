"""Turns work on a CUDA device into a recording of it, and independent works into branches of one recording.

`Recorder` is all that the rest of this folder knows of CUDA's graphs and streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.chunking import is_out_of_memory

Work = Callable[[], Any]
# cuDNN and cuBLAS choose their kernels in these, and compilers compile; neither can happen while recording.
WARM_UP_RUNS = 3
# ResNet-18, 16 members, batch 1 on an H100: 4.43 ms on one stream, 2.62 on 2, 1.58 on 4, 1.01 on 8, 1.03 on 16.
STREAMS = 8


@dataclass(frozen=True)
class Recording:
    """Work that can be done again without its Python.

    Attributes:
        replay: Does it again on whatever the tensors hold that it was recorded with.
        outputs: What it gives, in tensors that each replay overwrites.
    """

    replay: Callable[[], None]
    outputs: Any


class Recorder(Protocol):
    """Records work of one device, and runs works beside each other."""

    device: torch.device

    def record(self, work: Work) -> Recording:
        """Record work whose tensors stay where they are, all on the device, and which never waits for them."""

    def side_by_side(self, works: Sequence[Work]) -> list[Any]:
        """Do works that don't need each other, at the same time where the device can; what each gives, in order."""


class CudaRecorder:
    """CUDA graphs of one device, which share the memory of their intermediate values.

    Args:
        device: Where the work is.
        streams: On how many streams works run side by side, at most.

    Raises:
        LoadError: The device isn't a CUDA device.
    """

    def __init__(self, device: torch.device, streams: int = STREAMS) -> None:
        if device.type != "cuda":
            raise LoadError(f"recording: expected the members on a CUDA device, got {device}")
        self.device, self._most = device, streams
        self._streams: list[torch.cuda.Stream] = []
        self._pool: Any = None

    def record(self, work: Work) -> Recording:
        """Run the work until everything is chosen that a first run chooses, then record it.

        Raises:
            LoadError: It can't be recorded: it waits for the device's numbers, or copies from the host.
        """
        current = torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                work()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own: torch's own is of whichever device was the first one to record. thread_local:
        # threads that decode images into page-locked memory go on meanwhile.
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                outputs = work()
        except Exception as error:  # whatever somebody's model may raise; CUDA then ends the recording with another
            if is_out_of_memory(error):
                raise
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            told = f"{type(cause).__name__}: {first_line(cause)}"
            raise LoadError(f"can't be recorded as a CUDA graph: {told}") from error
        self._pool = self._pool or graph.pool()
        return Recording(graph.replay, outputs)

    def side_by_side(self, works: Sequence[Work]) -> list[Any]:
        """Work number i runs on stream i modulo their number; all are forked from and joined into the current one."""
        current, count = torch.cuda.current_stream(self.device), min(self._most, len(works))
        while len(self._streams) < count:
            self._streams.append(torch.cuda.Stream(self.device))
        streams = self._streams[:count]
        for stream in streams:
            stream.wait_stream(current)
        results = []
        for number, work in enumerate(works):
            with torch.cuda.stream(streams[number % count]):
                results.append(work())
        for stream in streams:
            current.wait_stream(stream)
        return results
