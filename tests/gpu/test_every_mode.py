"""Every handler's networks, each mode and dtype on a GPU: the same cells that `python -m benchmarks.gpu` checks."""

import pytest
import torch

from benchmarks.gpu.correctness import COMPILED, cases, check
from vmap_ensemble.process.device import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CELLS = [
    pytest.param(case, dtype, mode, id=f"{case.handler}, {dtype}, {mode}")
    for case in cases()
    for dtype in DTYPES
    for mode in case.modes
    if mode not in COMPILED or dtype == "fp16"
]


@pytest.mark.parametrize(("case", "dtype", "mode"), CELLS)
def test_outputs_are_the_members_own(case, dtype, mode):
    row = check(case, DTYPES[dtype], mode, torch.device("cuda:0"))
    assert row["error"] is None
    assert mode in (row["serves"], "auto")
