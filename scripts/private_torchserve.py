"""Turns archives into a real TorchServe on free ports, for the length of a `with` block.

The configuration is the repository's own, with ports and paths replaced, so that what is tested and measured is
what is shipped. Each server has its own temp, log and working folder, and ends with the block, workers included.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from scripts.torchserve_process import Launch, read_logs, read_properties, start, stop, wait_until_ready

ROOT = Path(__file__).resolve().parents[1]
PORT_KEYS = ("inference_address", "management_address", "metrics_address")
GRPC_PORT_KEYS = ("grpc_inference_port", "grpc_management_port")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def derive_config(source: Path, target: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Copies a config.properties with free ports on 127.0.0.1 and absolute paths."""
    properties = read_properties(source)
    ports = free_ports(len(PORT_KEYS) + len(GRPC_PORT_KEYS))
    for key, port in zip(PORT_KEYS, ports, strict=False):
        scheme = properties[key].split(":", 1)[0]
        properties[key] = f"{scheme}://127.0.0.1:{port}"
    for key, port in zip(GRPC_PORT_KEYS, ports[len(PORT_KEYS) :], strict=True):
        properties[key] = str(port)
    properties["grpc_inference_address"] = properties["grpc_management_address"] = "127.0.0.1"
    for key in ("metrics_config", "vmargs"):
        properties[key] = re.sub(r"(?<![\w/])config/", f"{ROOT}/config/", properties[key])
    properties.update(settings)
    target.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
    return properties


def add_archive(archive: Path, target: Path, batching: Mapping[str, Any] | None) -> None:
    """Copies an archive; `batching` (batchSize, maxBatchDelay, minWorkers, ...) goes into its model-config yaml.

    Nothing outranks the yaml of an archive at start but the archive itself, so that is what is edited.
    """
    if not batching:
        shutil.copyfile(archive, target)
        return
    with zipfile.ZipFile(archive) as source:
        manifest = json.loads(source.read("MAR-INF/MANIFEST.json"))
        config_file = manifest["model"].setdefault("configFile", "model-config.yaml")
        names = source.namelist()
        config = yaml.safe_load(source.read(config_file)) if config_file in names else {}
        edited = {
            "MAR-INF/MANIFEST.json": json.dumps(manifest),
            config_file: yaml.safe_dump({**(config or {}), **batching}),
        }
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
            for name in names:
                if name not in edited and not name.endswith("/"):
                    copy.writestr(name, source.read(name))
            for name, text in edited.items():
                copy.writestr(name, text)


class TorchServe:
    """A real TorchServe that serves the given archives inside a `with` block.

    Args:
        archives: name of a model -> its .mar.
        batching: keys of the model-config yaml that are wanted different, for every archive.
        config: the config.properties to derive from.
        settings: further keys of the config.properties.
        certificate: PEM file that a TLS server's certificate is checked against.
        timeout_s: how long the workers may take to be READY.

    Raises:
        scripts.torchserve_process.ServerError: it did not start, with the lines of its log that say why.
    """

    def __init__(
        self,
        archives: Mapping[str, Path],
        *,
        batching: Mapping[str, Any] | None = None,
        config: Path = ROOT / "config" / "config.properties",
        settings: Mapping[str, str] | None = None,
        certificate: Path | None = None,
        timeout_s: float = 180.0,
    ) -> None:
        # Not pytest's tmp_path: a worker's socket needs a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="ts-"))
        self.timeout_s = timeout_s
        store = self.folder / "store"
        cwd = self.folder / "cwd"
        for made in (store, cwd):
            made.mkdir()
        for name, archive in archives.items():
            add_archive(Path(archive), store / f"{name}.mar", batching)
        properties = derive_config(config, self.folder / "config.properties", settings or {})
        models = {name: f"{name}.mar" for name in archives}
        self.launch = Launch(self.folder / "config.properties", store, models, self.folder, cwd)
        self.inference_url, self.management_url, self.metrics_url = (properties[key] for key in PORT_KEYS)
        self.grpc_address = f"127.0.0.1:{properties['grpc_inference_port']}"
        self.verify: ssl.SSLContext | bool = True
        if certificate is not None:
            self.verify = ssl.create_default_context(cafile=str(certificate))
        self.needs_key = properties["disable_token_authorization"] != "true"
        self.pid = 0

    def __enter__(self) -> TorchServe:
        process = start(self.launch)
        self.pid = process.pid
        self.process = process
        try:
            with self.client("management") as client:
                wait_until_ready(self.launch, process, client, self.timeout_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the server that this object started and removes its folder."""
        stop(self.pid)
        self.process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def key(self, purpose: str, timeout_s: float = 30.0) -> str:
        """A key from key_file.json; purpose is inference, management or API (which renews the others)."""
        file = self.launch.cwd / "key_file.json"
        deadline = time.monotonic() + timeout_s
        # TorchServe makes the file before it fills it.
        while not (file.is_file() and file.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        keys: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entry = keys[purpose]
        return str(entry["key"] if isinstance(entry, dict) else entry)

    def client(self, purpose: str = "inference", *, with_key: bool | None = None) -> httpx.Client:
        """An HTTP client for inference, management or metrics, with the key where the server asks for one."""
        url = {"inference": self.inference_url, "management": self.management_url, "metrics": self.metrics_url}
        headers = {}
        if self.needs_key if with_key is None else with_key:
            headers["Authorization"] = f"Bearer {self.key('inference' if purpose == 'inference' else 'management')}"
        return httpx.Client(base_url=url[purpose], headers=headers, verify=self.verify, timeout=60, trust_env=False)

    def predict(self, model: str = "ens", **request: Any) -> httpx.Response:
        """POSTs one prediction; `request` are httpx's own arguments (content, files, json, headers)."""
        with self.client() as client:
            return client.post(f"/predictions/{model}", **request)

    def describe(self, model: str = "ens", *, customized: bool = False) -> dict[str, Any]:
        """The model's description from the management API."""
        with self.client("management") as client:
            answer = client.get(f"/models/{model}", params={"customized": str(customized).lower()})
            answer.raise_for_status()
            description: dict[str, Any] = answer.json()[0]
            return description

    def metrics(self) -> str:
        """The Prometheus text of the metrics address."""
        with self.client("metrics") as client:
            return client.get("/metrics").raise_for_status().text

    def logs(self) -> str:
        """All that the server has logged so far."""
        return read_logs(self.launch)
