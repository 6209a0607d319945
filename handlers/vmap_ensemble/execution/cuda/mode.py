"""Registers the mode `cudagraph`: the vmapped forward, recorded once for each bucket of sizes."""

from __future__ import annotations

from collections.abc import Sequence

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.execution.cuda.graphs import BatchRows, Recorded
from vmap_ensemble.execution.cuda.recorder import CudaRecorder
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args


@mode("cudagraph", what="the recorded forward", place=1, devices=["cuda"])
def build_vmap(forward: Forward, _examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """Recorded at a bucket's first batch."""
    device = forward.members.device
    rows = BatchRows(forward, device, options.buckets, forward.channels_last)
    return Built(Recorded(rows, forward, CudaRecorder(device)), channels_last=forward.channels_last)
