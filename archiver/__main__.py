"""Turns a command line into archives, one checked archive, or one clear line about what is wrong.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 weights can't be fetched.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from archiver.blocks.read import read_blocks
from archiver.command_line import overrides_of, parse_arguments
from vmap_ensemble.errors import ArchiveError, EnsembleError, NetworkError

if TYPE_CHECKING:
    from archiver.blocks.request import ArchiveRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    # As an exception, so that a half-made archive is cleaned up.
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("archive: interrupted", file=sys.stderr)
        return 130
    except EnsembleError as error:
        if options.debug:
            traceback.print_exc()
        print(f"archive: {error}", file=sys.stderr)
        return 3 if isinstance(error, NetworkError) else 1
    except OSError as error:  # what a file system refuses: full, read-only, a name that is too long
        if options.debug:
            traceback.print_exc()
        print(f"archive: {error}", file=sys.stderr)
        return 1


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


def _run(options: argparse.Namespace) -> int:
    if options.check:
        return _check(options)
    # An archive can be made without any block, from the command line alone.
    only = options.name[0] if len(options.name) == 1 else None
    blocks = read_blocks(options.config, only) if options.config.is_file() or not options.members else {}
    if options.list:
        return _list(blocks, options.output)
    from archiver.blocks.request import check_files, make_request  # with pydantic, which a list needs not

    names = list(blocks) if options.all else options.name
    if not names:
        raise ArchiveError(f"{options.config.name}: holds no blocks")
    if options.tune and not options.force:
        names = _tune(names, options)
    folder = options.config.absolute().parent
    requests = [make_request(name, blocks, folder, **overrides_of(options)) for name in names]
    for request in requests:
        check_files(request)
    return _build(requests, options)


def _tune(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Tune the archives that there are; the names of the others, which are to be built."""
    there = [name for name in names if (options.output / f"{name}.mar").is_file()]
    changes = [key for key, value in overrides_of(options).items() if value and key != "tune"]
    if there and changes:
        told = f"--{changes[0].replace('_', '-')}: --tune measures the archive that is there"
        raise ArchiveError(f"{there[0]}.mar: {told}; --force builds another")
    if there:
        from rich.console import Console

        from archiver.tune import tune_archive  # here: it imports torch

        for name in there:
            tune_archive(options.output / f"{name}.mar", Console(), options.debug)
    return [name for name in names if name not in there]


def _build(requests: Sequence[ArchiveRequest], options: argparse.Namespace) -> int:
    from rich.console import Console

    from archiver.build import build_archive  # here: it imports torch, and a missing file is told without

    for request in requests:
        build_archive(request, options.output, options.force, Console(), options.debug)
    return 0


def _check(options: argparse.Namespace) -> int:
    mar, *rest = map(Path, options.check)
    for path in (mar, *rest):
        if not path.is_file():
            raise ArchiveError(f"{path}: no such file")
    from rich.console import Console

    from archiver.checking.check import check_archive  # here: it imports torch

    check_archive(mar, rest[0] if rest else None, Console(), options.debug)
    return 0


def _list(blocks: dict[str, dict[str, object]], output: Path) -> int:
    for name, block in blocks.items():
        state = "built" if (output / f"{name}.mar").is_file() else "not built"
        members = block.get("members", [])
        text = ", ".join(map(str, members)) if isinstance(members, list | dict) else str(members)
        print(f"{name:<20}{block.get('handler', '')!s:<24}{state:<12}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
