"""Metrics land in TorchServe's own cache, under their names and dimensions."""

from __future__ import annotations

import pytest

pytest.importorskip("ts")

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.metrics.metric_type_enum import MetricTypes

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.frontends.torchserve.metrics import Metrics
from vmap_ensemble.serving.metrics import METRICS


@pytest.fixture
def cache():
    cache = MetricsCacheYamlImpl(config_file_path="config/metrics.yaml")
    cache.initialize_cache()
    return cache


def test_names_and_dimensions(cache, capsys, caplog):
    metrics = Metrics(cache, "ens", "1.0")
    with caplog.at_level("INFO"):
        for name, (_, _, dimensions) in METRICS.items():
            metrics.record(name, 2, *("x" for _ in dimensions))
        metrics.flush()
    for name, (kind, _, dimensions) in METRICS.items():
        metric = cache.get_metric(name, MetricTypes[kind])
        assert [d.lower() for d in metric.dimension_names[: len(dimensions)]] == [d.lower() for d in dimensions]
        assert list(metric.dimension_names[-3:]) == ["ModelVersion", "ModelName", "Level"]
        assert f"{name}." in caplog.text + capsys.readouterr().out


def test_a_batch_is_one_record_of_the_lines_that_torchserve_writes(cache, caplog, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.5)
    metrics = Metrics(cache, "ens", "1.0")
    values = {"EnsembleForwardTime": 0.0123, "EnsembleBatchSize": 8, "EnsembleNonFiniteMembers": 1}
    with caplog.at_level("INFO", "ts.metrics"):
        for name, value in values.items():
            metrics.record(name, value, *(["m1"] if METRICS[name][2] else []))
        assert not caplog.records
        metrics.flush()
        metrics.flush()
        for name, value in values.items():
            own = ["m1"] if METRICS[name][2] else []
            cache.get_metric(name, MetricTypes[METRICS[name][0]]).add_or_update(value, [*own, "1.0", "ens", "Model"])
    ours, *theirs = caplog.records
    assert ours.getMessage() == "\n".join(record.getMessage() for record in theirs)
    assert ours.name == theirs[0].name


def test_other_dimensions_than_declared_are_refused(cache):
    cache.add_metric_to_cache("EnsembleNonFiniteMembers", "count", ["Level"], MetricTypes.COUNTER)
    with pytest.raises(
        SettingsError, match=r"expected the dimensions Member, ModelVersion, ModelName, Level, got Level"
    ):
        Metrics(cache, "ens", "1.0")
    cache.initialize_cache()
    with pytest.raises(ValueError, match="argument 2"):
        Metrics(cache, "ens", "1.0").record("EnsembleNonFiniteMembers", 1)


def test_unknown_name_is_refused():
    with pytest.raises(KeyError, match="unknown metric 'X'"):
        Metrics(None, "ens", "1.0").record("X", 1)
