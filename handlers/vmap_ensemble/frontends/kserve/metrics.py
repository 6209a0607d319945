"""Turns what happened in a batch into metrics of Prometheus' own client, which the SDK shows under /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter, Histogram

from vmap_ensemble.serving.metrics import BUCKETS, COMMON_LABELS, METRICS, check_name


class Metrics:
    """The metrics of one model.

    Args:
        model_name: Value of the label ModelName.
        version: Value of the label ModelVersion.
    """

    def __init__(self, model_name: str, version: str) -> None:
        self._labels = dict(zip(COMMON_LABELS, (version, model_name, "Model"), strict=True))

    def record(self, name: str, value: float, *labels: str) -> None:
        """Add a value; `labels` are the metric's own, in the order of METRICS.

        Raises:
            KeyError: There is no metric of this name.
            ValueError: The metric has more or fewer labels.
        """
        check_name(name)
        own = dict(zip(METRICS[name][2], labels, strict=True))
        metric = _metric(name).labels(**own, **self._labels)
        if isinstance(metric, Counter):
            metric.inc(value)
        else:
            metric.observe(value)


@functools.cache
def _metric(name: str) -> Counter | Histogram:
    """One for all models of the process: Prometheus' client knows each name once."""
    kind, unit, own = METRICS[name]
    labels = (*own, *COMMON_LABELS)
    if kind == "COUNTER":
        return Counter(name, unit, labels)
    return Histogram(name, unit, labels, buckets=BUCKETS[unit])
