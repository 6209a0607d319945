"""Turns Ray Serve's YAML files into a private Ray on this machine that runs them, for the length of a `with` block.

As a script it is that Ray: it runs `serve run --non-blocking FILE` for each line that it reads, and says how it went.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from scripts.private_torchserve import ROOT, free_ports

STORE_BYTES = 80 * 1024 * 1024


class RayServe:
    """A Ray of its own with two logical CPUs, bound to 127.0.0.1, that serves applications.

    Args:
        applications: As in Ray Serve's YAML.
        timeout_s: How long each deployment may take.
        variables: Further environment variables, of Ray and of all replicas.

    Raises:
        RuntimeError: They did not start, with the end of the log.
    """

    def __init__(
        self,
        applications: list[dict[str, Any]],
        timeout_s: float = 120.0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        # Not pytest's tmp_path: Ray's sockets need a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.timeout_s, self.applications, self.versions = timeout_s, applications, 0
        self.variables = dict(variables or {})
        self.port, self.metrics_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RayServe:
        # What commands that use this Ray need, too.
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "handlers"), str(ROOT)]),
            # Of its own: Ray leaves a token there, and nothing of this user's is read.
            "HOME": str(self.folder),
            # Ray takes the machine's address for 127.0.0.1 unless it is told that there is no cluster.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "500",
            **self.variables,
        }
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.private_ray", str(self.folder), str(self.metrics_port)],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self.deploy(self.applications)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def deploy(self, applications: list[dict[str, Any]]) -> None:
        """Have these applications served, and wait until they are."""
        self.submit(applications)
        self.wait()

    def submit(self, applications: list[dict[str, Any]]) -> None:
        """As `deploy`, without waiting."""
        self.versions += 1
        path = self.folder / f"{self.versions}.yaml"
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "logging_config": {"enable_access_log": False},
            "applications": applications,
        }
        path.write_text(yaml.safe_dump(config))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path} {self.timeout_s}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Wait for what was submitted."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("deployed: "):
                told = json.loads(line.removeprefix("deployed: "))
                if told["status"] == "RUNNING":
                    self.address = told["address"]
                    return
                raise RuntimeError(f"{told}\n{self.log()[-4000:]}")
        raise RuntimeError(f"Ray ended\n{self.log()[-4000:]}")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of Python that finds this Ray as its cluster."""
        return subprocess.run(
            [sys.executable, *command],
            env={**self.environment, "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=self.timeout_s,
        )

    def client(self) -> httpx.Client:
        """A client of the applications."""
        limits = httpx.Limits(max_connections=64)
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, limits=limits)

    def metrics(self) -> str:
        """What Ray tells Prometheus."""
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10, trust_env=False).text

    def log(self) -> str:
        """What the applications wrote, and Ray's own."""
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """End the Ray that this object started, and remove its folder."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


def main(folder: str, metrics_port: str) -> None:
    import ray
    from ray import serve
    from ray.serve.scripts import cli

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        namespace="serve",
        _node_ip_address="127.0.0.1",
        _temp_dir=f"{folder}/ray",
        _metrics_export_port=int(metrics_port),
    )
    try:
        for line in sys.stdin:
            path, timeout_s = line.split()
            cli(["run", "--non-blocking", path], standalone_mode=False)
            told = {"address": ray.get_runtime_context().gcs_address, **_wait(serve, float(timeout_s))}
            print(f"deployed: {json.dumps(told)}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait(serve: Any, timeout_s: float) -> dict[str, str]:
    """How the applications are once none is on its way any more."""
    ends = time.monotonic() + timeout_s
    while True:
        time.sleep(0.2)
        found = serve.status().applications
        states = {str(one.status.value): one.message for one in found.values()} if found else {"NOT_STARTED": ""}
        # Not UNHEALTHY: another replica comes for one that died.
        failed = next((status for status in states if status.endswith("FAILED")), None)
        if failed or list(states) == ["RUNNING"] or time.monotonic() > ends:
            status = failed or next((status for status in states if status != "RUNNING"), "RUNNING")
            return {"status": status, "message": states[status]}


if __name__ == "__main__":
    main(*sys.argv[1:])
