"""deploy/kubernetes against Kubernetes' own schemas, and it and compose.yaml against the rest of deploy/."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from scripts.private_torchserve import ROOT
from scripts.torchserve_process import read_properties
from tests.server.deploy.test_container import SERVE, copied, only, variables
from vmap_ensemble.frontends.health import parse_arguments

KUBERNETES = ROOT / "deploy" / "kubernetes"
MANIFESTS = [part for path in sorted(KUBERNETES.glob("*.yaml")) for part in yaml.safe_load_all(path.read_text())]
COMPOSE = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
CONTAINER_CONFIG = read_properties(ROOT / "config" / "container.properties")
UPSTREAM = re.compile(r"server ([\w.]+:\d+);")


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = [part for part in MANIFESTS if (part["kind"], part["metadata"]["name"]) == (kind, name)]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = find("Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


def id_of(part: dict[str, Any]) -> str:
    return f"{part['kind']} {part['metadata']['name']}"


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=id_of)
def test_manifests_fit_kubernetes_own_schemas(manifest: dict[str, Any], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(manifest, version, strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**manifest, "spec": {**manifest["spec"], "unknown": 1}}, version, strict=True)


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_a_probe_is_a_prediction_that_the_image_can_ask(probe: str) -> None:
    row = container("ensemble")[probe]
    tool, command, *arguments = row["exec"]["command"]
    options = parse_arguments(arguments)
    assert (tool, command) == ("vmap-ensemble", "health")
    assert options.timeout < row["timeoutSeconds"]
    assert options.url == "http://127.0.0.1:8080/predictions/ens"
    assert options.input in {target for _, target in copied(SERVE)}


@pytest.mark.parametrize("name", ["ensemble", "ensemble-proxy"])
def test_pods_are_nobody_and_are_found_by_their_services(name: str) -> None:
    pod = find("Deployment", name)["spec"]["template"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    own = container(name)["securityContext"]
    assert (own["allowPrivilegeEscalation"], own["capabilities"]) == (False, {"drop": ["ALL"]})
    service = find("Service", name)["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"] for port in container(name)["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports
    mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_pod_is_the_images() -> None:
    pod = find("Deployment", "ensemble")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == int(only(SERVE, "USER"))
    own = container("ensemble")
    assert {row["name"] for row in own["env"]} <= variables().keys()
    assert {mount["mountPath"] for mount in own["volumeMounts"]} == {"/models", only(SERVE, "VOLUME")}
    listening = {int(CONTAINER_CONFIG[f"{key}_address"].rpartition(":")[2]) for key in ("inference", "metrics")}
    assert {port["containerPort"] for port in own["ports"]} == listening
    assert {int(port) for port in only(SERVE, "EXPOSE").split()} == listening


def test_the_proxy_is_all_that_compose_lets_out() -> None:
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published["ensemble"] == []
    assert published["nginx"] == ["8443:8443"]
    assert all(port.startswith("127.0.0.1:") for name in ("prometheus", "grafana") for port in published[name])
    assert SERVICES["ensemble"]["networks"] == ["inside"]
    assert yaml.safe_load(COMPOSE)["networks"]["inside"] == {"internal": True}


def test_compose_mounts_what_is_there_and_sets_what_the_image_reads() -> None:
    for service in SERVICES.values():
        for source, _, _ in (mount.partition(":") for mount in service.get("volumes", [])):
            assert source in yaml.safe_load(COMPOSE)["volumes"] or (ROOT / "deploy" / source).exists(), source
        for kind in ("configs", "secrets"):
            named = {row["source"] for row in service.get(kind, [])}
            assert named <= yaml.safe_load(COMPOSE)[kind].keys()
    assert SERVICES["ensemble"]["environment"].keys() <= variables().keys()
    assert all(":-" in name for name in re.findall(r"\$\{([^}]*)\}", COMPOSE))  # each variable has a default


def test_everybody_names_the_server_as_it_is_called_there() -> None:
    configs = yaml.safe_load(COMPOSE)["configs"]
    assert UPSTREAM.findall(configs["servers"]["content"]) == ["ensemble:8080"]
    (targets,) = yaml.safe_load(configs["targets"]["content"])
    assert targets == {"targets": ["ensemble:8082"]}
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (upstream,) = UPSTREAM.findall(page)
    service = find("Service", "ensemble")
    assert upstream == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_a_body_that_nginx_lets_through_is_one_that_the_server_takes() -> None:
    (size,) = re.findall(r"client_max_body_size (\d+)m;", (ROOT / "deploy/nginx/ensembles.conf").read_text())
    assert int(size) * 1024 * 1024 == int(CONTAINER_CONFIG["max_request_size"])
