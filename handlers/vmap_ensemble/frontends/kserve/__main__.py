"""Turns a command line, the SDK's own options among it, into a server: python -m vmap_ensemble.frontends.kserve."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kserve import model_server

from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.errors import LoadError
from vmap_ensemble.frontends.limits import MOST_BYTES
from vmap_ensemble.process.outcome import exit_code


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m vmap_ensemble.frontends.kserve",
        description="Serve archives by KServe's protocols.",
        parents=[model_server.parser],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_dir", type=Path, default=Path("/mnt/models"), help="an archive, or the folder that it lies in")
    add("--batch_size", type=int, default=8, help="requests that share one forward, at most")
    add("--settings", type=_settings, default={}, metavar="JSON", help="instead of the archive's own settings")
    add("--max_request_bytes", type=int, default=MOST_BYTES, help="of a body over REST; 413 beyond it")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "max_request_bytes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if options.workers != 1:
        parser.error(f"--workers: expected 1, got {options.workers}: each would hold every member; raise minReplicas")
    return options


def _settings(text: str) -> dict[str, Any]:
    read = json.loads(text)
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"expected an object of JSON, got {type(read).__name__}")
    return read


def find_archives(path: Path, name: str) -> dict[str, Path]:
    """The archives of a folder, by the name that clients ask for.

    Args:
        path: An archive or the folder that one was unpacked into: served as `name`. Or a folder with a .mar in it, as
            KServe's storage initializer fills it; with several, each is served under its own name.
        name: For a single one.

    Raises:
        LoadError: There is none.
    """
    if path.is_file() or (path / SETTINGS_FILE).is_file():
        return {name: path}
    found = sorted(path.glob("*.mar"))
    if not found:
        raise LoadError(f"--model_dir {path}: expected an archive, or a folder with one, got neither")
    return {name: found[0]} if len(found) == 1 else {archive.stem: archive for archive in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Load and serve; returns 0 when it was told to stop, 1 where an archive can't be loaded."""
    options = parse_arguments(arguments)
    return exit_code("kserve", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from vmap_ensemble.frontends.kserve.model import EnsembleModel  # after the arguments: they import torch
    from vmap_ensemble.frontends.kserve.server import serve

    found = find_archives(options.model_dir, options.model_name)
    models = [EnsembleModel(name, path, options.batch_size, options.settings) for name, path in found.items()]
    for model in models:
        model.load()
    serve(models, options.max_request_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
