"""What of the recordings can be checked on any machine; tests/gpu has their values on a GPU."""

import pytest
import torch

from tests.unit.execution.cuda.fakes import FakeRecorder, capturing
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cuda import graphs
from vmap_ensemble.execution.cuda.graphs import BatchRows, Recorded, fill_static
from vmap_ensemble.execution.cuda.recorder import CudaRecorder

CPU = torch.device("cpu")
WEIGHT = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))


def run(x):
    return {"y": (x[None, :, None] @ WEIGHT).squeeze(2)}


def test_a_cpu_is_refused():
    with pytest.raises(LoadError, match="expected the members on a CUDA device, got cpu"):
        CudaRecorder(CPU)


@pytest.mark.parametrize("buckets", [[], [2, 1], [1, 1], [0, 1]])
def test_buckets_that_are_not_ascending_are_refused(buckets):
    with pytest.raises(LoadError, match="expected ascending batch sizes from 1"):
        BatchRows(run, CPU, buckets)


def test_padding_is_the_first_row():
    static = torch.full((4, 2), -1.0)
    fill_static(static, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert static.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]


def test_replays_equal_the_plain_run_and_a_bucket_is_recorded_once():
    recorder = FakeRecorder()
    recorded = Recorded(BatchRows(run, CPU, (2, 4)), run, recorder)
    given = [torch.randn(batch, 4) for batch in (1, 2, 3, 4, 5, 1)]
    found = [recorded(x)["y"] for x in given]
    for x, y in zip(given, found, strict=True):  # only now: an answer is no replay's to overwrite
        torch.testing.assert_close(y, run(x)["y"], rtol=0, atol=0)
    assert recorder.recorded == 2  # for 1 and 2, and for 3 and 4; 5 is larger than any


def test_the_bucket_that_was_used_least_recently_goes(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    recorder = FakeRecorder()
    recorded = Recorded(BatchRows(run, CPU, (1, 2, 3)), run, recorder)
    for batch in (1, 2, 1, 3, 1, 2):
        recorded(torch.randn(batch, 4))
    assert recorder.recorded == 4  # 1, 2, 3 for 2, and 2 again


class Refusing(FakeRecorder):
    """Records as many works as it is told to."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def record(self, work):
        if self.recorded == self.most:
            raise LoadError("can't be recorded as a CUDA graph: not now")
        return super().record(work)


def test_a_later_bucket_that_can_not_be_recorded_runs_without_and_is_logged_once(caplog):
    recorded = Recorded(BatchRows(run, CPU, (2, 4)), run, Refusing(1))
    for batch in (2, 4, 3, 1):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(recorded(x)["y"], run(x)["y"], rtol=0, atol=0)
    assert len(recorded.refused) == 1
    (line,) = caplog.messages
    assert line.endswith("run without a recording: can't be recorded as a CUDA graph: not now")


def test_the_first_bucket_that_can_not_be_recorded_is_an_error():
    with pytest.raises(LoadError, match="not now"):
        Recorded(BatchRows(run, CPU, (2, 4)), run, Refusing(0))(torch.randn(2, 4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_lie_as_the_forward_wants_them(channels_last):
    seen = []
    rows = BatchRows(lambda x: seen.append(x.stride()) or x[None], CPU, (2,), channels_last)
    Recorded(rows, run, FakeRecorder())(torch.randn(1, 3, 5, 5))
    assert seen[0] == ((75, 1, 15, 3) if channels_last else (75, 25, 5, 1))


@pytest.mark.parametrize(
    "wait", [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x if x.any() else -x]
)
def test_the_fake_forbids_what_waits_for_numbers(wait):
    with capturing(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        wait(torch.randn(4))
