"""Says what is measured of the batches that are answered: names, units and labels, whichever server reports them."""

from __future__ import annotations

# Name -> (type, unit, own labels). Each front end adds COMMON_LABELS behind a metric's own. Times are in seconds.
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "EnsembleParseTime": ("HISTOGRAM", "seconds", ()),
    "EnsembleForwardTime": ("HISTOGRAM", "seconds", ()),
    "EnsembleRespondTime": ("HISTOGRAM", "seconds", ()),
    "EnsembleBatchSize": ("HISTOGRAM", "count", ()),
    "EnsembleMutualInformation": ("HISTOGRAM", "nats", ()),
    "EnsembleRefusedRequests": ("COUNTER", "count", ("Status", "Reason")),
    "EnsembleAbstentions": ("COUNTER", "count", ()),
    "EnsembleMemberAnswers": ("COUNTER", "count", ("Member",)),
    "EnsembleNonFiniteMembers": ("COUNTER", "count", ("Member",)),
    "EnsembleFallbacks": ("COUNTER", "count", ("Reason",)),
}
COMMON_LABELS = ("ModelVersion", "ModelName", "Level")


def check_name(name: str) -> None:
    """Refuse what isn't a metric's name.

    Raises:
        KeyError: There is no metric of this name.
    """
    if name not in METRICS:
        raise KeyError(f"unknown metric '{name}'; known: {', '.join(METRICS)}")
