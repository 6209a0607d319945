"""Turns what happened in a batch into Ray's metrics, under the names and labels that TorchServe's have."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from vmap_ensemble.serving.metrics import BUCKETS, COMMON_LABELS, METRICS, check_name


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
