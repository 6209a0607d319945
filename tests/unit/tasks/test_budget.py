"""What the items of one request may cost together."""

from __future__ import annotations

import pytest

from vmap_ensemble.errors import ItemError
from vmap_ensemble.serving.statuses import status_of
from vmap_ensemble.tasks.budget import Budget


def test_items_are_counted_together():
    budget = Budget(100, "pixels", "max_request_pixels")
    budget.spend(60)
    budget.spend(40)
    with pytest.raises(ItemError, match=r"more than 100 pixels together \(max_request_pixels\)") as caught:
        budget.spend(1)
    assert status_of(caught.value) == 413
    assert budget.spent == 101
