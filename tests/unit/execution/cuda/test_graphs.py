"""What of the CUDA graphs can be checked on any machine, and their values where there is a GPU."""

import pytest
import torch

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cuda.graphs import CudaGraphs, fill_static


def test_a_cpu_is_refused():
    with pytest.raises(LoadError, match="expected the members on a CUDA device, got cpu"):
        CudaGraphs(lambda x: x, torch.device("cpu"))


@pytest.mark.parametrize("buckets", [[], [2, 1], [1, 1], [0, 1]])
def test_buckets_that_are_not_ascending_are_refused(buckets):
    with pytest.raises(LoadError, match="expected ascending batch sizes from 1"):
        CudaGraphs(lambda x: x, torch.device("cuda"), buckets)


def test_padding_is_the_first_row():
    static = torch.full((4, 2), -1.0)
    fill_static(static, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert static.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_equal_the_plain_run():
    weight = torch.randn(3, 1, 4, 5, device="cuda")
    run = lambda x: {"y": (x[None, :, None] @ weight).squeeze(2)}  # noqa: E731
    graphs = CudaGraphs(run, torch.device("cuda"), (2, 4))
    for batch in (1, 2, 3, 4, 5, 1):
        x = torch.randn(batch, 4, device="cuda")
        torch.testing.assert_close(graphs(x)["y"], run(x)["y"])
