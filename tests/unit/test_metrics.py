"""Metrics land in TorchServe's own cache, under their names and dimensions."""

from __future__ import annotations

import pytest
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from vmap_ensemble.metrics import METRICS, Metrics


def test_names_and_dimensions(capsys, caplog):
    cache = MetricsCacheYamlImpl(config_file_path="config/metrics.yaml")
    cache.initialize_cache()
    metrics = Metrics(cache, "ens")
    with caplog.at_level("INFO"):
        for name, (_, _, dimensions) in METRICS.items():
            metrics.record(name, 2, *("x" for _ in dimensions))
    for name, (kind, _, dimensions) in METRICS.items():
        metric = cache.get_metric(name, kind)
        assert [d.lower() for d in metric.dimension_names[: len(dimensions)]] == [d.lower() for d in dimensions]
        assert list(metric.dimension_names[-2:]) == ["ModelName", "Level"]
        assert f"{name}." in caplog.text + capsys.readouterr().out


def test_unknown_name_is_refused():
    with pytest.raises(KeyError, match="unknown metric 'X'"):
        Metrics(None, "ens").record("X", 1)
