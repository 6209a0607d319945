"""Registers the mode `cudagraph`: the vmapped forward, recorded once for each bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.execution.cuda.graphs import BUCKETS, CudaGraphs
from vmap_ensemble.execution.register import Built, ExecutionOptions, mode
from vmap_ensemble.execution.timing import Args


@mode("cudagraph", what="the recorded forward", place=1, devices=["cuda"])
def build(forward: Forward, _examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """Recorded at a size's first batch."""
    buckets = BUCKETS if options.buckets is None else options.buckets
    return Built(CudaGraphs(forward, forward.members.device, buckets), channels_last=forward.channels_last)
