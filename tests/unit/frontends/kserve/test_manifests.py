"""The manifests of deploy/kserve hold what KServe's and Kubernetes' own models know, and what our command takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kserve")

import kserve
from kubernetes import client as kubernetes

from vmap_ensemble.frontends.kserve.__main__ import parse_arguments

MANIFESTS = sorted((Path(__file__).parents[4] / "deploy" / "kserve").glob("*.yaml"))
PRIMITIVES = {"str": str, "int": int, "bool": bool, "object": object, "ResourceQuantity": str}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check(value: Any, kind: str, where: str) -> None:
    """A value is of the type that the SDK's models have been generated with, all keys known, none missing."""
    if listed := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        assert isinstance(value, list), f"{where}: expected a list"
        for number, part in enumerate(value):
            check(part, listed[1], f"{where}[{number}]")
    elif mapped := re.fullmatch(r"[Dd]ict[\[(]str, (.*)[\])]", kind):
        for key, part in value.items():
            check(part, mapped[1], f"{where}.{key}")
    elif kind in PRIMITIVES:
        assert isinstance(value, PRIMITIVES[kind]), f"{where}: expected {kind}, got {value!r}"
    else:
        model = getattr(kserve, kind, None) or getattr(kubernetes, kind)
        names = {shown: name for name, shown in model.attribute_map.items()}
        unknown = value.keys() - names.keys()
        assert not unknown, f"{where}: {kind} knows no {unknown}"
        for key, part in value.items():
            check(part, model.openapi_types[names[key]], f"{where}.{key}")
        model(**{names[key]: part for key, part in value.items()})  # raises for what is required and missing


def check_manifest(manifest: dict[str, Any]) -> None:
    group, _, version = manifest["apiVersion"].partition("/")
    assert group == "serving.kserve.io"
    check(manifest, f"{version[0].upper()}{version[1:]}{manifest['kind']}", manifest["kind"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_keys_and_values_are_those_of_the_schema(path: Path) -> None:
    check_manifest(read(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("storageUri", "storageURI"),
        ("minReplicas: 1", "minReplicas: one"),
        ("modelFormat: {name: vmap-ensemble}", "storage: {}"),
        ("v1beta1", "v1beta9"),
    ],
)
def test_what_is_wrong_is_noticed(old: str, new: str) -> None:
    (path,) = [path for path in MANIFESTS if path.name == "service.yaml"]
    text = path.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises((AssertionError, AttributeError, ValueError)):
        check_manifest(yaml.safe_load(text.replace(old, new)))


def containers() -> list[dict[str, Any]]:
    specs = [manifest["spec"] for manifest in map(read, MANIFESTS)]
    holders = [spec.get("predictor", spec) for spec in specs]
    return [container for holder in holders for container in holder.get("containers", ())]


def test_the_command_takes_what_containers_give_it() -> None:
    assert len(containers()) == 2
    for container in containers():
        assert container["command"] == ["python", "-m", "vmap_ensemble.frontends.kserve"]
        options = parse_arguments(container["args"])
        assert container["readinessProbe"]["httpGet"]["port"] == options.http_port
        assert {port["containerPort"] for port in container.get("ports", ())} <= {options.grpc_port}


def test_the_service_asks_for_a_format_that_the_runtime_has() -> None:
    by_kind = {(manifest := read(path))["kind"]: manifest["spec"] for path in MANIFESTS if path.name != "grpc.yaml"}
    model, runtime = by_kind["InferenceService"]["predictor"]["model"], by_kind["ServingRuntime"]
    assert model["modelFormat"]["name"] in {row["name"] for row in runtime["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["protocolVersions"]
