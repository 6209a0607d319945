"""Tensors that were joined for one copy are the same when taken apart."""

import pytest
import torch

from vmap_ensemble.core import transfer
from vmap_ensemble.core.transfer import join_bytes, split_bytes, to_host

TENSORS = [
    torch.tensor([[True, False, True]]),
    torch.arange(6).reshape(2, 3),
    torch.randn(4, 3).T,
    torch.tensor(7.5, dtype=torch.float16),
    torch.empty(0, 2),
    torch.tensor([float("nan"), float("-inf")], dtype=torch.float64),
]


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_joined_comes_apart_as_it_was(order):
    tensors = TENSORS[::order]
    joined = join_bytes(tensors)
    assert (joined.dtype, joined.dim()) == (torch.uint8, 1)
    assert joined.numel() == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for given, got in zip(tensors, split_bytes(joined, tensors), strict=True):
        torch.testing.assert_close(got, given, rtol=0, atol=0, equal_nan=True)
        assert got.dtype == given.dtype


def test_what_is_on_the_host_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(transfer, "join_bytes", lambda _: pytest.fail("copied"))
    assert all(got is given for got, given in zip(to_host(TENSORS), TENSORS, strict=True))
