"""Turns a command line into options, or one clear line about what is wrong; imports nothing that takes time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archiver import HOME

# Options that say what one archive is made of.
OF_ONE = (
    *("members", "handler", "architecture", "model_file", "input_shape", "labels", "model_config", "version"),
    *("set", "pretrained", "samples", "weights"),
)

EPILOG = """\
members:
  files (.pt .pth .bin .ckpt .tar .pkl .safetensors), directories of save_pretrained, folders of either, 'globs',
  torchvision:ResNet50_Weights.IMAGENET1K_V1

examples:
  ./archive.sh --list
  ./archive.sh resnet_ens --members a.pth b.pth c.pth
  ./archive.sh folds --handler resnet_handler.py --architecture torchvision:resnet50 --members 'runs/*/best.ckpt' \\
      --labels labels.json --input-shape 3 160 160 --set abstain_below_probability=0.6
  ./archive.sh mine --handler my_handler.py --model-file model.py:MyNet --members 'folds/*/model.pt'
  ./archive.sh resnet_ens --samples photos/              (with "quantization": "int8", or another dtype)
  ./archive.sh --all --force
  ./archive.sh resnet_ens --compile --force
  ./archive.sh bert_ens --onnx --force
  ./archive.sh resnet_ens --tune                         (once on each kind of machine that will serve it)
  ./archive.sh --check model_store/resnet_ens.mar data/images/sample.jpg

exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 weights can't be fetched
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="./archive.sh",
        description="Build TorchServe archives of ensembles from setup_config.json, and check them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", nargs="*", metavar="NAME", help="archives to build: blocks of setup_config.json")
    add("--members", nargs="+", metavar="M", help="checkpoints, instead of the block's")
    add("--handler", metavar="FILE", help="handler file, in the working directory or in handlers/")
    add("--architecture", metavar="A", help="such as torchvision:resnet50, instead of the block's or the handler's")
    add("--model-file", metavar="FILE", help="model.py, or model.py:Class, with the nn.Module of an own architecture")
    add("--input-shape", nargs="+", metavar="N", help="shape of one input, such as 3 160 160")
    add("--labels", metavar="FILE", help='JSON of the classes: {"0": "cat", ...} or a list')
    add("--model-config", metavar="FILE", help="yaml of TorchServe's settings: batch size, delay, workers")
    add("--version", metavar="V", help="the archive's version, 1.0 by default")
    add("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="any setting of docs/settings.md")
    add("--pretrained", metavar="DIR", help="config.json and tokenizer, where the members don't bring them")
    add("--weights", metavar="W", help="which weights to take of checkpoints that hold several, such as ema")
    add("--samples", nargs="+", metavar="S", help="input files or folders to calibrate and judge a precision on")
    add("--all", action="store_true", help="build every block")
    add("--force", action="store_true", help="replace an archive that exists")
    add("--allow-nan", action="store_true", help="archive NaN and infinite weights nevertheless")
    add("--no-check", action="store_true", help="don't load the archive once before it is done")
    add("--tune", action="store_true", help="measure at length what runs fastest here, and keep it in the archive")
    add("--compile", action="store_true", help="pack the forward as native code as well, for this kind of processor")
    add("--onnx", action="store_true", help="pack the members as one ONNX graph as well, for other engines")
    add("--output", type=Path, default=HOME / "model_store", metavar="DIR", help="default: model_store")
    add("--config", type=Path, default=HOME / "setup_config.json", metavar="FILE", help="the blocks")
    add("--check", nargs="+", metavar=("MAR", "INPUT"), help="run an archive's handler on one request")
    add("--list", action="store_true", help="list the blocks and whether their archive is built")
    add("--debug", action="store_true", help="show tracebacks and logs of what fails")
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.name, options.all, options.check, options.list))) != 1:
        parser.error("expected exactly one of NAME..., --all, --check, --list")
    given = [f"--{name.replace('_', '-')}" for name in OF_ONE if getattr(options, name)]
    if len(options.name) != 1 and given:
        parser.error(f"{given[0]} goes with one NAME; those of several archives stand in their blocks")
    if options.tune and not (options.name or options.all):
        parser.error("--tune goes with NAME or --all")
    if options.tune and options.no_check:
        parser.error("--tune loads the archive; leave --no-check away")
    if options.check and len(options.check) > 2:
        parser.error("--check takes an archive and at most one input")
    try:
        options.input_shape = _shape(options.input_shape)
        options.set = dict(map(_setting, options.set or ()))
    except ValueError as error:
        parser.error(str(error))
    return options


def _shape(given: list[str] | None) -> list[int] | None:
    """3 160 160, or 3,160,160."""
    if given is None:
        return None
    parts = [part for text in given for part in text.split(",") if part]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--input-shape: expected whole numbers such as 3 160 160, got {' '.join(given)}")
    return [int(part) for part in parts]


def _setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON where it is JSON, else a text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set: expected KEY=VALUE, got {text}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says instead of a block: keywords of `make_request`."""
    return {name: getattr(options, name) for name in (*OF_ONE, "allow_nan", "compile", "onnx", "no_check", "tune")}
