"""A forward that runs out of memory gives the same values in chunks, and remembers the size that held."""

import pytest
import torch

from vmap_ensemble.errors import OutOfMemory
from vmap_ensemble.execution.chunking import ChunkedRun, is_out_of_memory

WEIGHTS = torch.arange(1.0, 6.0)


class Limited:
    """M x B rows of values; more than `most` of them at a time don't fit."""

    def __init__(self, most, error=torch.OutOfMemoryError, start=0, stop=5, log=None):
        self.most, self.error, self.start, self.stop = most, error, start, stop
        self.log = [] if log is None else log

    def __call__(self, x, scale):
        members = self.stop - self.start
        self.log.append((members, x.shape[0]))
        if members * x.shape[0] > self.most:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return {"y": WEIGHTS[self.start : self.stop, None, None] * x * scale}

    def members(self, start, stop):
        return Limited(self.most, self.error, start, stop, self.log)


X, SCALE = torch.randn(7, 3), torch.tensor(2.0)
WANT = WEIGHTS[:, None, None] * X * SCALE


@pytest.mark.parametrize(
    ("most", "safe_batch", "safe_members"),
    [(35, None, None), (34, 3, None), (15, 3, None), (14, 1, None), (5, 1, None), (4, 1, 2), (1, 1, 1)],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_chunks_give_the_same_values_and_the_size_is_remembered(most, safe_batch, safe_members, error):
    limited = Limited(most, error)
    run = ChunkedRun(limited, 5, limited.members)
    torch.testing.assert_close(run(X, SCALE)["y"], WANT)
    assert (run.safe_batch, run.safe_members) == (safe_batch, safe_members)
    failures = run.out_of_memory
    limited.log.clear()
    torch.testing.assert_close(run(X, SCALE)["y"], WANT)
    assert run.out_of_memory == failures
    assert all(members * rows <= most for members, rows in limited.log)


def test_one_row_of_one_member_that_does_not_fit_is_out_of_memory():
    limited = Limited(0)
    run = ChunkedRun(limited, 5, limited.members)
    with pytest.raises(OutOfMemory, match="ran out of memory on a single example"):
        run(X, SCALE)


def test_other_errors_pass_through():
    def broken(x):
        raise RuntimeError("shapes do not match")

    run = ChunkedRun(broken, 5, lambda start, stop: broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(X)
    assert run.out_of_memory == 0


def test_a_real_failed_allocation_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
