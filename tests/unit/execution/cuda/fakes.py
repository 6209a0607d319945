"""A recorder for any machine: it keeps a work's tensors where they are, and forbids what no recording can hold."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vmap_ensemble.execution.cuda.recorder import Recording

_aten = torch.ops.aten
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NoHostAccess(TorchDispatchMode):
    """Refuses steps whose result, or its size, the host must read from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_numbers = func is _aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
        if _READS & set(func.tags) and not by_numbers:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def capturing():
    """As within torch.cuda.graph: whoever asks is told so, and nothing waits for the device."""
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True), NoHostAccess():
        yield


class FakeRecorder:
    """`Recorder` on a CPU: a replay runs the work's code again, into the outputs that the recording gave.

    Attributes:
        recorded: How many recordings were made.
        lanes: For each call of `side_by_side` how many works it was given.
    """

    def __init__(self, device=None):
        self.device = torch.device("cpu")
        self.recorded, self.lanes = 0, []

    def record(self, work):
        with capturing():
            outputs = work()
        self.recorded += 1

        def replay():
            with capturing():
                pytree.tree_map(lambda kept, new: kept.copy_(new), outputs, work())

        return Recording(replay, outputs)

    def side_by_side(self, works):
        self.lanes.append(len(works))
        return [work() for work in works]
