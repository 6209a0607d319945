"""Turns a folder of archives into a private server of KServe's SDK, for the length of a `with` block.

As a script it is that server, on 127.0.0.1 alone: the SDK has no option for that, and listens to everybody.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import httpx

from scripts.private_torchserve import ROOT, free_ports

READY = "/v2/health/ready"


class KServe:
    """`python -m vmap_ensemble.frontends.kserve` on free ports.

    Args:
        folder: Of archives.
        options: Further ones of the command.
        timeout_s: How long it may take until it is ready.

    Raises:
        RuntimeError: It isn't ready in time, with the end of its log.
    """

    def __init__(self, folder: Path, *options: str, timeout_s: float = 90.0) -> None:
        self.port, self.grpc_port = free_ports(2)
        self.timeout_s = timeout_s
        self.url, self.grpc_address = f"http://127.0.0.1:{self.port}", f"127.0.0.1:{self.grpc_port}"
        self.command = [sys.executable, "-m", "tests.server.kserve_process", "--model_dir", str(folder), *options]
        self.command += ["--http_port", str(self.port), "--grpc_port", str(self.grpc_port)]

    def __enter__(self) -> KServe:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        paths = os.pathsep.join([str(ROOT / "handlers"), str(ROOT)])
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, "PYTHONPATH": paths},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        ends = time.monotonic() + self.timeout_s
        with self.client() as client:
            while self.process.poll() is None and time.monotonic() < ends:
                try:
                    if client.get(READY).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        raise RuntimeError(f"not ready\n{self.log()[-4000:]}")

    def client(self) -> httpx.Client:
        """A client of its REST."""
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, limits=httpx.Limits(max_connections=64))

    def log(self) -> str:
        """What the server wrote."""
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> int:
        """Ask it to stop, as Kubernetes does; its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=30)

    def close(self) -> None:
        """End the process that this object started."""
        self.process.kill()
        self.process.wait(timeout=10)
        self._log.close()


def main() -> int:
    import grpc.aio
    import uvicorn

    from vmap_ensemble.frontends.kserve.__main__ import main as serve

    make_server, uvicorn.Config = grpc.aio.server, _loopback(uvicorn.Config)

    def private_server(*args: object, **options: object) -> grpc.aio.Server:
        server = make_server(*args, **options)
        listen = server.add_insecure_port
        server.add_insecure_port = lambda address: listen(address.replace("[::]", "127.0.0.1"))
        return server

    grpc.aio.server = private_server
    return serve()


def _loopback(config: type) -> type:
    class Config(config):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "host": "127.0.0.1"})

    return Config


if __name__ == "__main__":
    sys.exit(main())
