"""Turns what happened in a batch into TorchServe metrics, under the names that config/metrics.yaml declares."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.serving.metrics import COMMON_LABELS, METRICS, check_name

# The logger that TorchServe's own metrics go to: whoever sends those elsewhere has ours there, too.
TORCHSERVE_METRICS = logging.getLogger("ts.metrics.caching_metric")


class Metrics:
    """Collects the metrics of one model, and hands a batch's to TorchServe in one piece.

    TorchServe reads metrics as lines of a worker's output. Its own `add_or_update` writes and flushes each line by
    itself, and each wakes the frontend's reader; here all lines of a batch are one record, written once.

    Args:
        cache: TorchServe's metrics cache (`context.metrics`); None records nothing, as outside a server.
        model_name: Value of the dimension ModelName.
        version: Value of the dimension ModelVersion.

    Raises:
        SettingsError: metrics.yaml declares one of ours with another number of dimensions.
    """

    def __init__(self, cache: Any, model_name: str, version: str) -> None:
        self._tail = (version, model_name, "Model")
        self._metrics: dict[str, Any] = {}
        self._lines: list[str] = []
        if cache is None:
            return
        # Here: a handler file is imported where TorchServe isn't, too.
        from ts.metrics.metric_cache_errors import MetricsCacheKeyError
        from ts.metrics.metric_type_enum import MetricTypes

        self._host = socket.gethostname()
        # Values are matched to dimensions by position. Buckets are fixed at 0.005 to 10, which suits seconds.
        for name, (kind_name, unit, dimensions) in METRICS.items():
            kind, names = MetricTypes[kind_name], [*dimensions, *COMMON_LABELS]
            try:
                self._metrics[name] = metric = cache.get_metric(name, kind)
            except MetricsCacheKeyError:
                # Somebody's own metrics.yaml without ours: the log still gets them.
                self._metrics[name] = metric = cache.add_metric_to_cache(name, unit, names, kind)
            if len(metric.dimension_names) != len(names):
                raise SettingsError(
                    f"metrics.yaml: {name}: expected the dimensions {', '.join(names)}, got "
                    f"{', '.join(metric.dimension_names) or 'none'}"
                )

    def record(self, name: str, value: float, *dimensions: str) -> None:
        """Add a value; `dimensions` are the metric's own, in the order of METRICS.

        Raises:
            KeyError: There is no metric of this name.
            ValueError: The metric has more or fewer dimensions.
        """
        check_name(name)
        if self._metrics:
            self._lines.append(self._line(self._metrics[name], value, (*dimensions, *self._tail)))

    def flush(self) -> None:
        """Hand over what was recorded."""
        if self._lines:
            TORCHSERVE_METRICS.info("%s", "\n".join(self._lines))
            self._lines.clear()

    def _line(self, metric: Any, value: float, dimensions: tuple[str, ...]) -> str:
        """As CachingMetric.emit_metrics of ts/metrics/caching_metric.py writes it."""
        pairs = ",".join(f"{key}:{own}" for key, own in zip(metric.dimension_names, dimensions, strict=True))
        return (
            f"[METRICS]{metric.metric_name}.{metric.unit}:{value}|#{pairs}|#type:{metric.metric_type.name}"
            f"|#hostname:{self._host},{int(time.time())}"
        )
