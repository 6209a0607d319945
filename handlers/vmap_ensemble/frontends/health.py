"""Turns an address and one real input into an exit code: whether a prediction is answered within a time limit.

For probes, so it imports neither torch nor a server's library: a client of whatever serves an ensemble over HTTP.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

KEY_VARIABLE = "VMAP_ENSEMBLE_KEY"
EXAMPLE = "http://127.0.0.1:8080/predictions/ens"
# What is shown of an error's body, and read of it.
SHOWN, READ = 200, 4096


class UsageError(Exception):
    """The command line makes no sense: one line that says why."""


class Unhealthy(Exception):
    """No answer with status 200 within the limit: one line that says why."""


@dataclass(frozen=True)
class Probe:
    """One prediction to be asked for.

    Attributes:
        url: Where predictions are answered.
        body: What is sent.
        kind: Its content type.
        key: Sent as `Authorization: Bearer`, if there is one.
        cacert: PEM file that a TLS server's certificate is checked against, instead of the machine's own list.
        subset: Members that are asked, by name with commas between; None: as the archive does without.
    """

    url: str
    body: bytes
    kind: str
    key: str | None = None
    cacert: str | None = None
    subset: str | None = None


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is no answer, and would carry the key elsewhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def ask(probe: Probe, timeout_s: float) -> float:
    """Send one prediction and read its answer.

    Args:
        probe: What to ask, and where.
        timeout_s: For everything together, the lookup of the name and the last byte of the answer included.

    Returns:
        Seconds that it took.

    Raises:
        Unhealthy: The status isn't 200, nothing listens, or the time is over.
    """
    outcome: list[float | Exception] = []

    def run() -> None:
        try:
            outcome.append(_send(probe, timeout_s))
        except Exception as error:  # handed to the thread that waits
            outcome.append(error)

    # urllib's limit is one for each read: a server that sends a byte a second would never reach it.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise Unhealthy(f"{_place(probe.url)}: no answer within {timeout_s:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _send(probe: Probe, timeout_s: float) -> float:
    headers = {"Content-Type": probe.kind}
    headers |= {"Authorization": f"Bearer {probe.key}"} if probe.key else {}
    headers |= {"X-Ensemble-Subset": probe.subset} if probe.subset else {}
    request = urllib.request.Request(probe.url, data=probe.body, headers=headers, method="POST")
    # No proxy: a probe asks the server itself.
    handlers: list[Any] = [urllib.request.ProxyHandler({}), _StayHere()]
    started = time.monotonic()
    try:
        if probe.url.lower().startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=probe.cacert)))
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
            if answer.status != 200:
                raise Unhealthy(f"{_place(probe.url)}: status {answer.status}")
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise Unhealthy(f"{_place(probe.url)}: status {error.code}{_reason(error)}") from None
    except TimeoutError:
        raise Unhealthy(f"{_place(probe.url)}: no answer within {timeout_s:g} s") from None
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError and carries the real one
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise Unhealthy(f"{_place(probe.url)}: no answer within {timeout_s:g} s") from None
        raise Unhealthy(f"{_place(probe.url)}: {_one_line(str(reason) or type(reason).__name__)}") from None
    return time.monotonic() - started


def _reason(error: urllib.error.HTTPError) -> str:
    """The message of TorchServe's JSON or ours, else the beginning of the body."""
    try:
        text = error.read(READ).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""
    try:
        body = json.loads(text)
        inner = body.get("error", body)
        text = str(inner.get("message", text) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        pass
    return f", {_one_line(text)}" if text.strip() else ""


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:SHOWN]


def _place(url: str) -> str:
    """The address as it is shown: without a query, which may be a secret."""
    return url.partition("?")[0]


def read_key(path: str | None) -> str | None:
    """The key of a file, or of the environment where no file is named.

    Args:
        path: TorchServe's key_file.json, of which `inference` is taken, or a file that holds the key alone.

    Raises:
        UsageError: The file can't be read or holds no key.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    text = _read(path, "--key-file").decode("utf-8", "replace").strip()
    if text.startswith("{"):
        try:
            entry = json.loads(text)["inference"]
            text = str(entry["key"] if isinstance(entry, dict) else entry)
        except (ValueError, KeyError):
            raise UsageError(
                f"--key-file {path}: expected TorchServe's keys with 'inference', or a key alone"
            ) from None
    if not (text and text.isascii() and text.isprintable()):
        raise UsageError(f"--key-file {path}: expected one key, got {'nothing' if not text else 'other characters'}")
    return text


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None


def make_probe(options: argparse.Namespace) -> Probe:
    """What the command line asks for.

    Raises:
        UsageError: The address is none, or a file can't be read.
    """
    try:
        parts = urllib.parse.urlsplit(options.url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if whole and "@" in parts.netloc:
        raise UsageError(f"URL: expected no user or password; a key goes into ${KEY_VARIABLE} or --key-file")
    if not whole or parts.path in ("", "/") or not options.url.isascii() or " " in options.url:
        raise UsageError(f"URL: expected where predictions are answered, such as {EXAMPLE}, got {options.url[:80]}")
    if options.cacert is not None:
        _read(options.cacert, "--cacert")
    body, kind = _body(options)
    subset = options.subset
    if subset is not None and not (subset.strip() and subset.isascii() and subset.isprintable()):
        raise UsageError(f"--subset: expected names of members as a header may have them, got {subset[:80]!r}")
    return Probe(options.url, body, kind, read_key(options.key_file), options.cacert, subset)


def _body(options: argparse.Namespace) -> tuple[bytes, str]:
    if options.text is not None:
        return options.text.encode(), "text/plain; charset=utf-8"
    if options.json is not None:
        try:
            json.loads(options.json)
        except ValueError as error:
            raise UsageError(f"--json: expected JSON: {error}") from None
        return options.json.encode(), "application/json"
    guessed, _ = mimetypes.guess_type(options.input)
    return _read(options.input, "--input"), guessed or "application/octet-stream"


def positive(text: str) -> float:
    """Seconds as a number above 0; argparse says so where they are not."""
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below a day, got {text}")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="vmap-ensemble health",
        description="Ask a server for one real prediction. A server's /ping says healthy without any worker.",
        epilog=f"exit codes: 0 answered with status 200, 1 not, 2 wrong usage. A key is read from ${KEY_VARIABLE}"
        " or from --key-file, never from the command line, which others can see.",
    )
    add = parser.add_argument
    add("url", metavar="URL", help=f"where predictions are answered, such as {EXAMPLE}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="FILE", help="a small input to send: an image, a text, a .json")
    what.add_argument("--text", metavar="TEXT", help="a text to send")
    what.add_argument("--json", metavar="JSON", help="a JSON body to send")
    add("--subset", metavar="NAMES", help="members that are asked, with commas; some archives want it")
    add("--timeout", type=positive, default=5.0, metavar="S", help="seconds for the whole answer (default: 5)")
    add("--key-file", metavar="FILE", help="TorchServe's key_file.json, or a file with the key alone")
    add("--cacert", metavar="FILE", help="PEM certificate to check the server's against")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; returns 0 with the latency printed, else 1 (2 for wrong usage) with one line on standard error."""
    options = parse_arguments(arguments)
    try:
        seconds = ask(make_probe(options), options.timeout)
    except UsageError as error:
        print(f"health: {error}", file=sys.stderr)
        return 2
    except Unhealthy as error:
        print(f"health: {error}", file=sys.stderr)
        return 1
    print(f"healthy: answered in {seconds * 1e3:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
