"""Turns what happened in a batch into Ray's metrics, under the names and labels that TorchServe's have."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from vmap_ensemble.serving.metrics import COMMON_LABELS, METRICS, check_name

# Upper ends of the buckets, by unit. Ray makes a histogram's sum of its buckets' middles, so these lie around the
# whole numbers that batches have most, and close together elsewhere.
BUCKETS: dict[str, list[float]] = {
    "seconds": [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10],
    "count": [*(size + 0.5 for size in range(17)), 24.5, 32.5, 48.5, 64.5, 96.5, 128.5, 256.5],
    "nats": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5],
}


class Metrics:
    """The metrics of one model in one replica; Ray adds the labels deployment, replica and application.

    Args:
        model_name: Value of the label ModelName.
        version: Value of the label ModelVersion.
    """

    def __init__(self, model_name: str, version: str) -> None:
        self._tags = dict(zip(COMMON_LABELS, (version, model_name, "Model"), strict=True))
        self._metrics = {name: _make(name, *row) for name, row in METRICS.items()}

    def record(self, name: str, value: float, *labels: str) -> None:
        """Add a value; `labels` are the metric's own, in the order of METRICS.

        Raises:
            KeyError: There is no metric of this name.
            ValueError: The metric has more or fewer labels.
        """
        check_name(name)
        kind, _, own = METRICS[name]
        tags = {**dict(zip(own, labels, strict=True)), **self._tags}
        if kind == "COUNTER":
            self._metrics[name].inc(value, tags=tags)
        else:
            self._metrics[name].observe(value, tags=tags)


def _make(name: str, kind: str, unit: str, own: tuple[str, ...]) -> Any:
    keys: Any = (*own, *COMMON_LABELS)  # Ray says a tuple of one, and takes any
    if kind == "COUNTER":
        return metrics.Counter(name, description=unit, tag_keys=keys)
    return metrics.Histogram(name, description=unit, boundaries=BUCKETS[unit], tag_keys=keys)
