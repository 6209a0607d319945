"""Turns what the items of one request cost into a refusal, before its neighbours have to wait for it."""

from __future__ import annotations

from vmap_ensemble.errors import TooLargeItem


class Budget:
    """What one request may cost over all its items; make a new one for each request.

    Args:
        limit: The most.
        unit: Of what: `pixels`, `tokens`.
        setting: The key that sets the limit.
    """

    def __init__(self, limit: int, unit: str, setting: str) -> None:
        self.limit, self.unit, self.setting, self.spent = limit, unit, setting, 0

    def spend(self, amount: int) -> None:
        """Count one item.

        Raises:
            ItemError: where the request costs more than it may.
        """
        self.spent += amount
        if self.spent > self.limit:
            raise TooLargeItem(
                f"the request's items hold more than {self.limit} {self.unit} together ({self.setting}); send them "
                "in several requests",
            )
