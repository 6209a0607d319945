"""config/: what TorchServe would refuse at start, or misread in silence, is refused here."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from scripts.torchserve_process import read_properties

CONFIG = Path(__file__).resolve().parents[3] / "config"
OWN_DIMENSIONS = {
    "EnsembleRefusedRequests": ("counter", ["Status", "Reason"]),
    "EnsembleAbstentions": ("counter", []),
    "EnsembleMemberAnswers": ("counter", ["Member"]),
    "EnsembleNonFiniteMembers": ("counter", ["Member"]),
    "EnsembleDissentingMembers": ("counter", ["Member"]),
    "EnsembleFallbacks": ("counter", ["Reason"]),
    "EnsembleParseTime": ("histogram", []),
    "EnsembleForwardTime": ("histogram", []),
    "EnsembleRespondTime": ("histogram", []),
    "EnsembleBatchSize": ("histogram", []),
    "EnsembleMutualInformation": ("histogram", []),
}
MODEL_CONFIGS = sorted(file for file in CONFIG.glob("*.yaml") if file.name not in ("metrics.yaml", "ray_serve.yaml"))
WORKER_KEYS = {"minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout"}


def test_metrics_load_with_torchserves_own_parser() -> None:
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.metrics.metric_type_enum import MetricTypes

    cache = MetricsCacheYamlImpl(config_file_path=str(CONFIG / "metrics.yaml"))
    cache.initialize_cache()
    for name, (kind, own) in OWN_DIMENSIONS.items():
        metric = cache.get_metric(name, MetricTypes(kind))
        assert metric.dimension_names == [*own, "ModelVersion", "ModelName", "Level"], name


def test_torchserves_own_metrics_are_kept() -> None:
    import ts

    shipped = yaml.safe_load((Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text())
    ours = yaml.safe_load((CONFIG / "metrics.yaml").read_text())
    assert ours["ts_metrics"] == shipped["ts_metrics"]
    assert ours["model_metrics"]["gauge"] == shipped["model_metrics"]["gauge"]


def test_own_machine_config_is_loopback_without_keys() -> None:
    properties = read_properties(CONFIG / "config.properties")
    addresses = [value for key, value in properties.items() if key.endswith("_address")]
    assert len(addresses) == 5
    assert all("127.0.0.1" in address for address in addresses)
    assert properties["disable_token_authorization"] == "true"
    assert properties["default_workers_per_model"] == "1"


def test_production_config_has_keys_tls_and_no_model_api() -> None:
    properties = read_properties(CONFIG / "production.properties")
    assert properties["disable_token_authorization"] == "false"
    assert properties["enable_model_api"] == "false"
    assert properties["management_address"].startswith("https://127.0.0.1")
    assert all(properties[f"{key}_address"].startswith("https") for key in ("inference", "metrics"))
    assert {"certificate_file", "private_key_file", "max_request_size"} <= properties.keys()
    assert properties["enable_grpc_ssl"] == "true"


def test_container_config_is_for_neighbours_and_keeps_the_management_inside() -> None:
    properties = read_properties(CONFIG / "container.properties")
    assert properties["inference_address"] == "http://0.0.0.0:8080"
    assert properties["metrics_address"] == "http://0.0.0.0:8082"
    assert "127.0.0.1" in properties["management_address"]
    assert properties["enable_model_api"] == "false"
    assert properties["allowed_urls"] == read_properties(CONFIG / "production.properties")["allowed_urls"]


@pytest.mark.parametrize("name", ["config.properties", "production.properties", "container.properties"])
def test_files_that_a_config_names_exist(name: str) -> None:
    properties = read_properties(CONFIG / name)
    assert (CONFIG.parent / properties["metrics_config"]).is_file()
    log_config = properties["vmargs"].split("-Dlog4j.configurationFile=")[1].split()[0]
    ElementTree.parse(CONFIG.parent / log_config)


@pytest.mark.parametrize("file", MODEL_CONFIGS, ids=lambda file: file.name)
def test_model_configs_start_one_worker_and_never_say_zero_delay(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    assert settings.keys() == WORKER_KEYS
    assert settings["minWorkers"] == settings["maxWorkers"] == 1
    # 0 means 100 ms to TorchServe
    assert settings["maxBatchDelay"] > 0
