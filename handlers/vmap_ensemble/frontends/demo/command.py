"""Turns an archive into a page on 127.0.0.1, until Ctrl-C: what `vmap-ensemble demo` does."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.outcome import exit_code

# Loopback alone: the page asks for no key.
HOST = "127.0.0.1"


class NoServer(EnsembleError):
    """What serves the page isn't installed; the text says how to."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble demo",
        description="A web page on this machine: drop a picture or type a text, and see what the members say.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("--name", default="ens", help="what is asked for: /predictions/NAME (default: ens)")
    add("--port", type=int, default=8090, metavar="N", help="of 127.0.0.1; 0 takes a free one (default: 8090)")
    add("--execution", metavar="MODE", help="instead of the archive's; eager starts at once")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        parser.error(f"--port: expected 0 to 65535, got {options.port}")
    if not options.name.isascii() or not options.name.replace("-", "").replace("_", "").isalnum():
        parser.error(f"--name: expected letters, digits, '-' and '_', got {options.name}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page; returns 130 once Ctrl-C has ended it, 1 where the archive or the port can't be had."""
    options = parse_arguments(arguments)
    return exit_code("demo", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from vmap_ensemble.frontends.demo.application import BATCH_SIZE, Demo
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise NoServer(f"the page needs {error.name}: pip install 'vmap-ensemble[page]'") from None
    from vmap_ensemble.frontends.loading import load_served
    from vmap_ensemble.process.threads import cores_at_hand

    with socket.socket() as listener:  # before seconds of loading
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, options.port))
        except OSError as error:
            raise NoServer(f"{HOST}:{options.port}: {error.strerror}; --port 0 takes a free one") from None
        settings = {} if options.execution is None else {"execution": options.execution}
        ensemble = load_served(str(options.archive), BATCH_SIZE, cores_at_hand(), settings)
        demo = Demo(ensemble, options.name)
        print(f"http://{HOST}:{listener.getsockname()[1]}/ shows {options.archive.name}; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(demo.application(), log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
