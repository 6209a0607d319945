"""deploy/nginx as docs/proxy.md sets it up: a real nginx before a real TorchServe, over HTTP and gRPC."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from scripts.private_torchserve import ROOT, TorchServe, free_ports
from vmap_ensemble.client.grpc import PACKAGE, GrpcClient

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx isn't installed: apt-get install nginx")

PAGE = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
INSTALL, KEY, ASK, INSTALL_GRPC = (
    next(block for block in re.findall(r"\n\n((?: {4}[^\n]*\n)+)", PAGE) if part in block)
    for part in ("install -D", "openssl rand", "curl", "ensembles_grpc.conf")
)
DIGIT = (ROOT / "data" / "digits" / "3.png").read_bytes()
# Debian's nginx.conf, with nothing outside of the test's folder.
MAIN = """\
{user}
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 128; }}
http {{
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    include conf.d/*.conf;
}}
"""


@dataclass
class Front:
    """An nginx that runs the repository's configuration in a folder that stands for /etc/nginx."""

    folder: Path
    port: int
    grpc_port: int
    certificate: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.folder / "ensembles" / "keys.map").read_text().split('"')[1].removeprefix("Bearer ")

    def context(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.certificate))
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context

    def client(self, *, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        return httpx.Client(base_url=self.url, verify=self.context(), headers=headers, trust_env=False, timeout=30)

    def connect(self, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.context(version).wrap_socket(plain, server_hostname="127.0.0.1")

    def shell(self, text: str) -> str:
        text = text.replace("/etc/nginx", str(self.folder)).replace(":8443", f":{self.port}")
        done = subprocess.run(["bash", "-ec", text], cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


Starts = Callable[..., Front]


@pytest.fixture
def start(tmp_path: Path, server: TorchServe, certificate: tuple[Path, Path]) -> Iterator[Starts]:
    """Starts an nginx as the page says; arguments are (what ensembles.conf says, what is wanted for a test).

    With `grpc`, the address of a server, gRPC is let through as well, and the changes are of ensembles_grpc.conf.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def starter(*changes: tuple[str, str], grpc: str = "") -> Front:
        front = Front(tmp_path, *free_ports(2), certificate[0])
        (tmp_path / "config" / "tls").mkdir(parents=True)
        for file in certificate:
            shutil.copy(file, tmp_path / "config" / "tls")
        for name in ("deploy", "data"):
            (tmp_path / name).symlink_to(ROOT / name)
        front.shell(INSTALL)
        front.shell(KEY)
        edit(
            tmp_path / "ensembles" / "servers.conf", ("127.0.0.1:8080", server.inference_url.removeprefix("http://"))
        )
        own = (("listen 8443", f"listen 127.0.0.1:{front.port}"), ("/var/log/nginx/", f"{tmp_path}/"))
        edit(tmp_path / "conf.d" / "ensembles.conf", *own, *([] if grpc else changes))
        if grpc:
            front.shell(INSTALL_GRPC)
            edit(tmp_path / "ensembles" / "grpc_servers.conf", ("server 127.0.0.1:7070", f"server {grpc}"))
            own = (("listen 8444", f"listen 127.0.0.1:{front.grpc_port}"), ("/var/log/nginx/", f"{tmp_path}/"))
            edit(tmp_path / "conf.d" / "ensembles_grpc.conf", *own, *changes)
        user = "user root;" if os.geteuid() == 0 else ""
        (tmp_path / "nginx.conf").write_text(MAIN.format(user=user))
        command = [str(NGINX), "-p", f"{tmp_path}/", "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        with (tmp_path / "errors").open("w") as errors:
            front.process = subprocess.Popen(command, stderr=errors)
        processes.append(front.process)
        wait_until_open(front, front.process)
        return front

    yield starter
    for process in processes:
        process.terminate()
        process.wait(timeout=30)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def wait_until_open(front: Front, process: subprocess.Popen[bytes], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            front.connect().close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError((front.folder / "errors").read_text())


def head(front: Front, length: int, model: str = "echo") -> bytes:
    return (
        f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
        f"Authorization: Bearer {front.key}\r\n\r\n"
    ).encode()


def test_the_page_as_written(start: Starts) -> None:
    front = start()
    assert '"prediction"' in front.shell(ASK)
    assert (front.folder / "ensembles" / "keys.map").stat().st_mode & 0o077 == 0
    assert len(front.key) == 64
    front.shell(f"{NGINX} -t -p {front.folder}/ -c nginx.conf -e stderr")


def test_a_known_key_opens_and_goes_no_further(start: Starts) -> None:
    front = start()
    with front.client() as nobody, front.client(key="0" * 64) as stranger, front.client() as alice:
        del nobody.headers["Authorization"]
        for client in (nobody, stranger):
            refused = client.post("/predictions/ens", content=DIGIT)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert alice.post("/predictions/ens", content=DIGIT).status_code == 200
        sent = {"describe": "True", "explain": "True", "X-Ensemble-Top-K": "2"}
        arrived = alice.post("/predictions/echo", content=b"x", headers=sent).json()
    assert arrived["x-ensemble-top-k"] == "2"
    assert not {"authorization", "describe"} & arrived.keys()
    assert arrived["explain"] == "False"  # TorchServe's own


def test_nothing_else_is_let_out(start: Starts, server: TorchServe) -> None:
    front = start()
    paths = ("/", "/metrics", "/models", "/models/ens", "/ping", "/predictions/../metrics", "//metrics", "/token")
    with front.client() as alice:
        assert {path: alice.get(path).status_code for path in paths} == dict.fromkeys(paths, 404)
        refused = alice.get("/predictions/ens")
        assert (refused.status_code, refused.headers["Allow"]) == (405, "POST, PUT")
        # Errors of the server's own stay as they are.
        assert alice.post("/predictions/ens", content=b"no image").json()["error"]["code"] == 415
    with server.client() as inside:
        assert inside.get("/ping").status_code == 200


def test_tls_1_3_and_1_2_answer_and_nothing_older(start: Starts) -> None:
    front = start()
    for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
        with front.connect(version) as stream:
            assert stream.version() == version.name.replace("_", ".")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises(ssl.SSLError):
        front.connect(ssl.TLSVersion.TLSv1_1)
    weak = front.context(ssl.TLSVersion.TLSv1_2)
    weak.set_ciphers("ECDHE-RSA-AES128-SHA")  # CBC: TorchServe takes it
    with socket.create_connection(("127.0.0.1", front.port)) as plain, pytest.raises(ssl.SSLError):
        weak.wrap_socket(plain, server_hostname="127.0.0.1")


def test_slow_senders_are_cut_where_torchserve_holds_them(start: Starts, server: TorchServe) -> None:
    front = start(("client_header_timeout 10s", "client_header_timeout 1s"), ("body_timeout 10s", "body_timeout 1s"))
    host, port = server.inference_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as direct, front.connect() as body, front.connect() as headers:
        direct.sendall(head(front, 100) + b"x")
        body.sendall(head(front, 100) + b"x")
        headers.sendall(head(front, 100)[:40])
        assert ended(body)
        assert ended(headers)
        direct.setblocking(False)
        with pytest.raises(BlockingIOError):  # neither closed nor answered
            direct.recv(1)
    assert " 408 " in wait_for_log(front, " alice ")


def ended(stream: ssl.SSLSocket) -> bool:
    """Whether the server closes, with nothing or with a 408, before the client's own 30 s are over."""
    try:
        said = stream.recv(4096)
        return said == b"" or b" 408 " in said.partition(b"\r\n")[0]
    except TimeoutError:
        return False
    except OSError:  # a reset, or TLS that ends without its last message
        return True


def wait_for_log(front: Front, text: str, timeout_s: float = 20.0) -> str:
    """The line of the log that has the text; nginx writes every 5 s."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lines = (front.folder / "ensembles.log").read_text().splitlines()
        found = [line for line in lines if text in line]
        if found:
            assert front.key not in "".join(lines)
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"the log has no line with {text!r}")


def test_a_large_body_is_refused_before_it_is_sent(start: Starts) -> None:
    front = start()
    with front.connect() as stream:
        stream.sendall(head(front, 8 * 1024 * 1024 + 1))  # and not a byte of it
        assert stream.recv(4096).startswith(b"HTTP/1.1 413")
    pieces = (bytes(1024 * 1024) for _ in range(9))
    with front.client() as alice:
        with suppress(httpx.WriteError):  # it may be cut while it sends
            assert alice.post("/predictions/echo", content=pieces).json()["error"]["code"] == 413  # chunked
        assert alice.post("/predictions/echo", content=bytes(7 * 1024 * 1024)).status_code == 200


def test_each_client_has_its_own_rate(start: Starts) -> None:
    front = start(("rate=100r/s", "rate=1r/m"), ("burst=200", "burst=2"))
    bob = "b" * 64
    with (front.folder / "ensembles" / "keys.map").open("a") as keys:
        keys.write(f'"Bearer {bob}" bob;\n')
    front.process.send_signal(signal.SIGHUP)  # as nginx -s reload and systemctl reload nginx
    assert statuses_of(front, bob, until=200)[-1] == 200
    assert statuses_of(front, front.key, until=429) == [200] * 3 + [429]
    # For a moment the worker that doesn't know of bob still takes connections.
    assert set(statuses_of(front, bob, until=200)) <= {401, 200}


def statuses_of(front: Front, key: str, until: int, timeout_s: float = 30.0) -> list[int]:
    """The statuses of requests one after another, up to the first that is wanted."""
    statuses: list[int] = []
    deadline = time.monotonic() + timeout_s
    while until not in statuses and time.monotonic() < deadline:
        with front.client(key=key) as client:
            statuses.append(client.post("/predictions/echo", content=b"x").status_code)
    return statuses


def test_a_client_has_so_many_connections(start: Starts) -> None:
    front = start(("limit_conn connections_of_a_client 64", "limit_conn connections_of_a_client 2"))
    with ExitStack() as stack:
        held = [stack.enter_context(front.connect()) for _ in range(3)]
        for stream in held:
            stream.sendall(head(front, 100) + b"x")
            stream.setblocking(False)
        # Two wait for the rest of their bodies, for 10 s; the one of the three that came last is refused at once.
        assert first_answer(held).startswith(b"HTTP/1.1 429")


def first_answer(streams: list[ssl.SSLSocket], timeout_s: float = 9.0) -> bytes:
    """What is said first on any of them; b"" where one is closed, or nothing is said."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for stream in streams:
            with suppress(ssl.SSLWantReadError):
                return stream.recv(4096)
        time.sleep(0.05)
    return b""


def grpc_client(front: Front, *, model: str = "ens", key: str | None = None) -> GrpcClient:
    key = front.key if key is None else key
    address = f"127.0.0.1:{front.grpc_port}"
    return GrpcClient(address, model, key=key, certificate=front.certificate, timeout_s=30)


def refusal_of(call: Callable[..., object], *arguments: object) -> tuple[grpc.StatusCode, str]:
    """How a call over gRPC was refused, and in which words."""
    with pytest.raises(grpc.RpcError) as refused:
        call(*arguments)
    return refused.value.code(), refused.value.details()


def code_of(call: Callable[..., object], *arguments: object) -> grpc.StatusCode:
    return refusal_of(call, *arguments)[0]


def test_grpc_reaches_torchserve_with_a_known_key(start: Starts, server: TorchServe) -> None:
    front = start(grpc=server.grpc_address)
    with grpc_client(front) as alice, GrpcClient(server.grpc_address, "ens") as inside:
        assert alice.predict_bytes(DIGIT) == inside.predict_bytes(DIGIT)
        assert alice.stream(DIGIT) == inside.stream(DIGIT)
    for key in ("", "0" * 64):
        with grpc_client(front, key=key) as stranger:
            assert code_of(stranger.predict_bytes, DIGIT) is grpc.StatusCode.UNAUTHENTICATED
    assert " alice " in wait_for_log(front, "/Predictions")


def test_grpc_lets_out_predictions_alone_and_bounds_messages(start: Starts, server: TorchServe) -> None:
    front = start(grpc=server.grpc_address)
    with kserve_channel(front) as channel:
        for method in (
            f"{PACKAGE}.InferenceAPIsService/Ping",
            "org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels",
            "grpc.health.v1.Health/Check",
        ):
            call = channel.unary_unary(f"/{method}")
            metadata = (("authorization", f"Bearer {front.key}"),)
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", metadata=metadata, timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, method
    with grpc_client(front, model="echo") as alice:
        code, words = refusal_of(alice.predict_bytes, bytes(9 * 1024 * 1024))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than is taken here" in words  # nginx', not TorchServe's
        alice.predict_bytes(bytes(1024))


@contextmanager
def kserve_that_echoes() -> Iterator[str]:
    """A gRPC server with KServe's method, which answers with the metadata that came to it, or late; its address."""
    late = threading.Event()

    def infer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"late":
            late.wait(30)
        return "".join(f"{key}={value};" for key, value in context.invocation_metadata()).encode()

    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    running = grpc.server(ThreadPoolExecutor(2))
    running.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)]
    )
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        late.set()
        running.stop(None).wait()


@contextmanager
def kserve_channel(front: Front) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(front.certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{front.grpc_port}", credentials) as channel:
        yield channel


INFER = "/inference.GRPCInferenceService/ModelInfer"


def test_grpc_hands_on_options_to_kserve_but_no_key(start: Starts) -> None:
    with kserve_that_echoes() as address:
        front = start(("burst=200 ", "burst=2 "), grpc=address)
        known = ("authorization", f"Bearer {front.key}")
        with kserve_channel(front) as channel:
            call = channel.unary_unary(INFER)
            sent = (known, ("x-ensemble-top-k", "2"), ("describe", "True"), ("explain", "True"))
            arrived = call(b"x", metadata=sent, timeout=30).decode()
            assert "x-ensemble-top-k=2;" in arrived
            assert not any(f"{key}=" in arrived for key in ("authorization", "describe", "explain"))
            # More at once than the burst of two lets in.
            calls = [call.future(b"x", metadata=(known,), timeout=30) for _ in range(30)]
            assert {one.code() for one in calls} == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    with kserve_channel(front) as channel:
        call = channel.unary_unary(INFER)
        assert code_of(lambda: call(b"x", metadata=(known,), timeout=30)) is grpc.StatusCode.UNAVAILABLE


def test_grpc_cuts_slow_senders_and_late_answers(start: Starts) -> None:
    limits = (
        ("client_body_timeout 10s", "client_body_timeout 1s"),
        ("grpc_read_timeout 130s", "grpc_read_timeout 2s"),
    )
    ended = threading.Event()

    def never_whole() -> Iterator[bytes]:
        ended.wait(30)
        yield b"x"

    with kserve_that_echoes() as address:
        front = start(*limits, grpc=address)
        known = {"metadata": (("authorization", f"Bearer {front.key}"),), "timeout": 25}
        with kserve_channel(front) as channel:
            code, words = refusal_of(lambda: channel.unary_unary(INFER)(b"late", **known))
            assert (code, "in time" in words) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
            # Cut by nginx: it would be the client's own deadline otherwise, in other words.
            code, words = refusal_of(lambda: channel.stream_unary(INFER)(never_whole(), **known))
            ended.set()
            assert "Deadline Exceeded" not in words, (code, words)
