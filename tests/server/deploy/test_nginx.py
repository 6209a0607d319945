"""deploy/nginx/ensembles.conf as docs/proxy.md sets it up: a real nginx before a real TorchServe."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from scripts.private_torchserve import ROOT, TorchServe, free_ports

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx isn't installed: apt-get install nginx")

PAGE = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
INSTALL, KEY, ASK = (
    next(block for block in re.findall(r"\n\n((?: {4}[^\n]*\n)+)", PAGE) if part in block)
    for part in ("install -D", "openssl rand", "curl")
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
    """Starts an nginx as the page says; arguments are (what ensembles.conf says, what is wanted for a test)."""
    processes: list[subprocess.Popen[bytes]] = []

    def starter(*changes: tuple[str, str]) -> Front:
        front = Front(tmp_path, free_ports(1)[0], certificate[0])
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
        edit(tmp_path / "conf.d" / "ensembles.conf", *own, *changes)
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
