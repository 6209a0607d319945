"""Turns a command line into archives, one checked archive, or one clear line about what is wrong.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 weights can't be fetched.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from archiver import HOME
from archiver.blocks import make_request, read_blocks
from archiver.build import build_archive
from archiver.check import check_archive
from archiver.resolve import NetworkError
from vmap_ensemble.errors import ArchiveError, EnsembleError

EPILOG = """\
members:
  files (.pt .pth .bin .ckpt .tar .pkl .safetensors), directories of save_pretrained, folders of either, 'globs',
  torchvision:ResNet50_Weights.IMAGENET1K_V1

examples:
  ./archive.sh --list
  ./archive.sh resnet_ens --members a.pth b.pth c.pth
  ./archive.sh mine --handler my_handler.py --model-file model.py --members 'folds/*/model.pt'
  ./archive.sh resnet_ens --samples photos/              (with "quantization": "int8", or another dtype)
  ./archive.sh --all --force
  ./archive.sh resnet_ens --compile --force
  ./archive.sh --check model_store/resnet_ens.mar kitten.jpg

exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 weights can't be fetched
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="./archive.sh",
        description="Build TorchServe archives of ensembles from setup_config.json, and check them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", nargs="*", metavar="NAME", help="archives to build: blocks of setup_config.json")
    add("--members", nargs="+", metavar="M", help="checkpoints, instead of the block's")
    add("--handler", metavar="FILE", help="handler file, in the working directory or in handlers/")
    add("--model-file", metavar="FILE", help="model.py with the nn.Module class of an own architecture")
    add("--pretrained", metavar="DIR", help="config.json and tokenizer, where the members don't bring them")
    add("--weights", metavar="W", help="which weights to take of checkpoints that hold several, such as ema")
    add("--samples", nargs="+", metavar="S", help="input files or folders to calibrate and judge a precision on")
    add("--all", action="store_true", help="build every block")
    add("--force", action="store_true", help="replace an archive that exists")
    add("--allow-nan", action="store_true", help="archive NaN and infinite weights nevertheless")
    add("--compile", action="store_true", help="pack the forward as native code as well, for this kind of processor")
    add("--output", type=Path, default=HOME / "model_store", metavar="DIR", help="default: model_store")
    add("--config", type=Path, default=HOME / "setup_config.json", metavar="FILE", help="the blocks")
    add("--check", nargs="+", metavar=("MAR", "INPUT"), help="run an archive's handler on one request")
    add("--list", action="store_true", help="list the blocks and whether their archive is built")
    add("--debug", action="store_true", help="show tracebacks and logs of what fails")
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.name, options.all, options.check, options.list))) != 1:
        parser.error("expected exactly one of NAME..., --all, --check, --list")
    single = (
        options.members,
        options.handler,
        options.model_file,
        options.pretrained,
        options.samples,
        options.weights,
    )
    if len(options.name) != 1 and any(single):
        parser.error("--members, --handler, --model-file, --pretrained, --weights and --samples go with one NAME")
    if options.check and len(options.check) > 2:
        parser.error("--check takes an archive and at most one input")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    # As an exception, so that a half-made archive is cleaned up.
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(options, Console())
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


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.check:
        mar, *rest = options.check
        check_archive(Path(mar), Path(rest[0]) if rest else None, console, options.debug)
        return 0
    # An archive can be made without any block, from the command line alone.
    only = options.name[0] if len(options.name) == 1 else None
    blocks = read_blocks(options.config, only) if options.config.is_file() or not options.members else {}
    if options.list:
        return _list(blocks, options.output, console)
    names = list(blocks) if options.all else options.name
    if not names:
        raise ArchiveError(f"{options.config.name}: holds no blocks")
    for name in names:
        request = make_request(
            name,
            blocks,
            options.config.absolute().parent,
            members=options.members,
            handler=options.handler,
            model_file=options.model_file,
            allow_nan=options.allow_nan,
            pretrained=options.pretrained,
            samples=options.samples,
            weights=options.weights,
        )
        request = dataclasses.replace(request, compile=options.compile)
        build_archive(request, options.output, options.force, console)
    return 0


def _list(blocks: dict[str, dict[str, object]], output: Path, console: Console) -> int:
    for name, block in blocks.items():
        state = "built" if (output / f"{name}.mar").is_file() else "not built"
        members = block.get("members", [])
        text = ", ".join(map(str, members)) if isinstance(members, list | dict) else str(members)
        console.print(f"{name:<20}{block.get('handler', '')!s:<24}{state:<12}{text}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
