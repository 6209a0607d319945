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
    "EnsembleDissentingMembers": ("COUNTER", "count", ("Member",)),
    "EnsembleFallbacks": ("COUNTER", "count", ("Reason",)),
}
COMMON_LABELS = ("ModelVersion", "ModelName", "Level")
# Upper ends of the buckets, by unit, where a server lets them be chosen. Ray makes a histogram's sum of its buckets'
# middles, so these lie around the whole numbers that batches have most, and close together elsewhere.
BUCKETS: dict[str, list[float]] = {
    "seconds": [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10],
    "count": [*(size + 0.5 for size in range(17)), 24.5, 32.5, 48.5, 64.5, 96.5, 128.5, 256.5],
    "nats": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5],
}


def check_name(name: str) -> None:
    """Refuse what isn't a metric's name.

    Raises:
        KeyError: There is no metric of this name.
    """
    if name not in METRICS:
        raise KeyError(f"unknown metric '{name}'; known: {', '.join(METRICS)}")
