"""`vmap-ensemble health`: a real server on a free port answers, refuses, hangs, trickles, or isn't there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from archiver.command import main as command
from vmap_ensemble.frontends.health import main

ROOT = Path(__file__).resolve().parents[3]
PATH = "/predictions/ens"


class Served:
    """A server whose answers a function writes, and the requests that it saw."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.seen: list[dict[str, Any]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen.append({"path": self.path, "body": body, "headers": dict(self.headers)})
                answer(self)

            do_GET = do_POST  # a redirect that was followed would be seen

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}{PATH}"


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Served]:
    served = Served(answer)
    thread = threading.Thread(target=served.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        served.server.server_close()


def reply(
    status: int, body: bytes, headers: dict[str, str] | None = None
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_an_answer_is_healthy_and_its_latency_is_printed(capsys, tmp_path):
    image = tmp_path / "probe.png"
    image.write_bytes(b"\x89PNG bytes")
    with serving(reply(200, b'{"prediction": {}}')) as served:
        assert command(["health", served.url, "--input", str(image)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("healthy: answered in ")
    assert out.rstrip().endswith(" ms")
    assert not err
    (request,) = served.seen
    assert (request["path"], request["body"]) == (PATH, b"\x89PNG bytes")
    assert request["headers"]["Content-Type"] == "image/png"
    assert "Authorization" not in request["headers"]


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [("--text", "où", "text/plain; charset=utf-8"), ("--json", '{"data": [1]}', "application/json")],
)
def test_texts_and_json_say_what_they_are(option, value, kind):
    with serving(reply(200, b"{}")) as served:
        assert main([served.url, option, value]) == 0
    assert served.seen[0]["body"] == value.encode()
    # without a type of its own urllib would say that the body is a form, which the server refuses
    assert served.seen[0]["headers"]["Content-Type"] == kind


def test_where_an_archive_wants_one_a_member_is_named():
    with serving(reply(200, b"{}")) as served:
        assert main([served.url, "--text", "x", "--subset", "acme,hooli"]) == 0
        assert main([served.url, "--text", "x"]) == 0
    assert [request["headers"].get("X-Ensemble-Subset") for request in served.seen] == ["acme,hooli", None]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, {"code": 503, "type": "ServiceUnavailableException", "message": "Model has no worker"}, "Model has no"),
        (415, {"error": {"code": 415, "message": "not an\nimage"}}, "not an image"),
        (500, "plain \x1b[31m text", "plain"),
    ],
)
def test_another_status_is_one_line_with_the_servers_reason(capsys, status, body, said):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    with serving(reply(status, data)) as served:
        assert main([served.url, "--text", "x"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"health: {served.url}: status {status}, {said}")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_a_long_error_is_cut(capsys):
    with serving(reply(500, b"x" * 100_000)) as served:
        assert main([served.url, "--text", "x"]) == 1
    assert len(capsys.readouterr().err) < 400


def test_204_and_redirects_are_no_answer(capsys):
    with serving(reply(204, b"")) as served:
        assert main([served.url, "--text", "x"]) == 1
    with serving(reply(302, b"", {"Location": "/elsewhere"})) as served:
        assert main([served.url, "--text", "x"]) == 1
    assert [request["path"] for request in served.seen] == [PATH]
    assert "status 204" in (err := capsys.readouterr().err)
    assert "status 302" in err


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(2)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """Headers at once, then a byte now and then: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


@pytest.mark.parametrize("answer", [hang, trickle])
def test_the_time_limit_is_one_for_everything(capsys, answer):
    with serving(answer) as served:
        started = time.monotonic()
        assert main([served.url, "--text", "x", "--timeout", "0.4"]) == 1
        assert time.monotonic() - started < 1.5
    assert capsys.readouterr().err == f"health: {served.url}: no answer within 0.4 s\n"


def test_an_answer_that_is_cut_off_is_none(capsys):
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")

    with serving(cut) as served:
        assert main([served.url, "--text", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_where_nothing_listens_it_says_so(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
        url = f"http://127.0.0.1:{probe.getsockname()[1]}{PATH}"
        assert main([url, "--text", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"health: {url}: ")
    assert "refused" in err
    assert err.count("\n") == 1


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    keys = tmp_path / "key_file.json"
    keys.write_text(json.dumps({"inference": {"key": "from-json", "expiration time": "…"}, "API": {"key": "no"}}))
    alone = tmp_path / "key"
    alone.write_text("alone\n")
    monkeypatch.setenv("VMAP_ENSEMBLE_KEY", "from-environment")
    with serving(reply(200, b"{}")) as served:
        assert main([served.url, "--text", "x"]) == 0
        assert main([served.url, "--text", "x", "--key-file", str(keys)]) == 0
        assert main([served.url, "--text", "x", "--key-file", str(alone)]) == 0
    got = [request["headers"]["Authorization"] for request in served.seen]
    assert got == ["Bearer from-environment", "Bearer from-json", "Bearer alone"]


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(reply(200, b"{}")) as served:
        assert main([served.url, "--text", "x"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["127.0.0.1:8080", "--text", "x"], "expected where predictions are answered"),
        (["http://127.0.0.1:8080", "--text", "x"], "expected where predictions are answered"),
        (["http://127.0.0.1:x/predictions/ens", "--text", "x"], "expected where predictions are answered"),
        (["http://me:secret@127.0.0.1/predictions/ens", "--text", "x"], "expected no user or password"),
        (["http://127.0.0.1/predictions/ens", "--input", "absent.png"], "--input absent.png: No such file"),
        (["http://127.0.0.1/predictions/ens", "--json", "{"], "--json: expected JSON"),
        (["http://127.0.0.1/predictions/ens", "--text", "x", "--key-file", "absent"], "--key-file absent: No such"),
        (["http://127.0.0.1/predictions/ens", "--text", "x", "--subset", "a\nb"], "--subset: expected names"),
    ],
)
def test_wrong_usage_is_one_line_and_2(capsys, arguments, said):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "secret" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", '{"inference": {}}', "", "a\nb", "{broken"])
def test_files_without_a_key_are_refused(capsys, tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    assert main(["http://127.0.0.1/predictions/ens", "--text", "x", "--key-file", str(file)]) == 2
    assert "--key-file" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--text", "x", "--json", "1"], ["--text", "x", "--timeout", "0"]])
def test_exactly_one_input_and_a_limit_above_0(more):
    with pytest.raises(SystemExit) as stopped:
        main(["http://127.0.0.1/predictions/ens", *more])
    assert stopped.value.code == 2


def test_a_probe_loads_no_torch():
    script = (
        "import sys; from archiver.command import main; import vmap_ensemble.frontends.health;"
        "print([name for name in ('torch', 'numpy', 'ts', 'pydantic', 'rich') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
