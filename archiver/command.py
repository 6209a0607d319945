"""Turns `vmap-ensemble COMMAND ...` into the tool of that name, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vmap_ensemble.version import __version__

# Command -> module, what it puts before the arguments, one line of help.
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "archive": ("archiver.__main__", (), "build archives: what ./archive.sh does"),
    "check": ("archiver.__main__", ("--check",), "load an archive and ask it: check MAR [INPUT]"),
    "list": ("archiver.__main__", ("--list",), "list the blocks of setup_config.json"),
    "predict": ("vmap_ensemble.offline.command", (), "answer a folder or a table: predict MAR INPUT --output FILE"),
    "export": ("optimise.export", (), "write all members as one file: export MAR --to onnx --output FILE"),
    "distil": ("optimise.distil.command", (), "N members into one network, or heads: distil MAR --data DIR"),
    "prune": (
        "optimise.prune.command",
        (),
        "cut the same channels from all members: prune MAR --data DIR",
    ),
    "quantise": ("optimise.quantise.command", (), "encoders in 8 bits: quantise MAR --samples DATA --output MAR"),
    "demo": ("vmap_ensemble.frontends.demo.command", (), "a page on 127.0.0.1 to try an archive with: demo MAR"),
    "health": ("vmap_ensemble.frontends.health", (), "ask a server for one real prediction: health URL --input FILE"),
}


def usage() -> str:
    """The page that --help prints."""
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, _, text) in COMMANDS.items())
    return f"usage: vmap-ensemble COMMAND [options]\n\n{rows}\n\nvmap-ensemble COMMAND --help tells its options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given and given[0] == "--version":
        print(f"vmap-ensemble {__version__}")
        return 0
    if not given or given[0] not in COMMANDS:
        print(usage(), file=sys.stderr)
        return 2
    module, before, _ = COMMANDS[given[0]]
    run: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    rest = given[1:]
    # Behind --check, which wants a value, --help would be a mistake.
    return run(rest if rest[:1] in (["-h"], ["--help"]) else [*before, *rest])


if __name__ == "__main__":
    sys.exit(main())
