"""Turns what happened in a batch into TorchServe metrics, under the names that config/metrics.yaml declares."""

from __future__ import annotations

from typing import Any

from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes

# Name -> (type, unit, own dimensions). Values are matched to dimensions by position: own ones first, then
# ModelName and Level. TorchServe's histogram buckets are fixed at 0.005 to 10, so times are in seconds.
METRICS: dict[str, tuple[MetricTypes, str, tuple[str, ...]]] = {
    "EnsembleParseTime": (MetricTypes.HISTOGRAM, "seconds", ()),
    "EnsembleForwardTime": (MetricTypes.HISTOGRAM, "seconds", ()),
    "EnsembleRespondTime": (MetricTypes.HISTOGRAM, "seconds", ()),
    "EnsembleBatchSize": (MetricTypes.HISTOGRAM, "count", ()),
    "EnsembleMutualInformation": (MetricTypes.HISTOGRAM, "nats", ()),
    "EnsembleRefusedRequests": (MetricTypes.COUNTER, "count", ("Status",)),
    "EnsembleNonFiniteMembers": (MetricTypes.COUNTER, "count", ("Member",)),
    "EnsembleFallbacks": (MetricTypes.COUNTER, "count", ("Reason",)),
}


class Metrics:
    """Records the metrics of one model.

    Args:
        cache: TorchServe's metrics cache (`context.metrics`); None records nothing, as outside a server.
        model_name: Value of the dimension ModelName.
    """

    def __init__(self, cache: Any, model_name: str) -> None:
        self._tail = [model_name, "Model"]
        self._metrics: dict[str, Any] = {}
        if cache is None:
            return
        for name, (kind, unit, dimensions) in METRICS.items():
            try:
                self._metrics[name] = cache.get_metric(name, kind)
            except MetricsCacheKeyError:
                # Somebody's own metrics.yaml without ours: the log still gets them.
                names = [*dimensions, "ModelName", "Level"]
                self._metrics[name] = cache.add_metric_to_cache(name, unit, names, kind)

    def record(self, name: str, value: float, *dimensions: str) -> None:
        """Add a value; `dimensions` are the metric's own, in the order of METRICS."""
        if name not in METRICS:
            raise KeyError(f"unknown metric '{name}'; known: {', '.join(METRICS)}")
        if self._metrics:
            self._metrics[name].add_or_update(value, [*dimensions, *self._tail])
