"""Names the options that several tools have: what is learnt from, how, what may be lost, and where it is computed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from vmap_ensemble.process.outcome import exit_code

DATA = """\
data:
  a folder of images or .txt files in folders named by their label, or without; a .csv, .tsv, .jsonl or .parquet table
  with paths or texts and a column 'label'; a folder with MNIST's idx files
"""
AMP = ("none", "bf16", "fp16")
RUN = """\
A run that is cut off goes on where it was when the same command is given again.

exit codes: 0 done, 1 refused or beyond the gate, 2 wrong usage, 130 stopped
"""


def add_data(parser: argparse.ArgumentParser, maker: str) -> None:
    """What is learnt from, what is read beside it, and where what is made goes."""
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("--data", type=Path, required=True, metavar="DATA", help=f"what the {maker} learns from")
    add("--output", type=Path, required=True, metavar="DIR", help=f"folder of the {maker}")
    add("--test", type=Path, metavar="DATA", help="what it is judged by; else a part of --data is held out")
    add("--held-out", type=float, default=0.1, metavar="S", help="share of --data that decides when to stop (0.1)")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How data are read, and what the uncertainty is judged by."""
    add = parser.add_argument
    add("--unlike", type=Path, metavar="DATA", help="inputs of another kind, which the uncertainty is to tell")
    add("--column", metavar="NAME", help="column of a table that holds paths of images, or texts")
    add("--label-column", metavar="NAME", help="column of a table that holds labels; 'label' by default")
    add("--unlabelled", action="store_true", help="look for no labels; folders are no labels")


def add_training(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    add = parser.add_argument
    add("--epochs", type=int, default=20, metavar="N", help="passes over the examples, at most (20)")
    add(
        "--patience", type=int, default=5, metavar="N", help="epochs without a lower held-out loss until it stops (5)"
    )
    add("--batch-size", type=int, default=64, metavar="N", help="examples in a step (64)")
    add("--lr", type=float, metavar="R", help="the highest learning rate (0.001; 0.0001 for texts)")
    add("--weight-decay", type=float, default=1e-2, metavar="W", help="of AdamW (0.01)")
    add("--temperature", type=float, default=2.0, metavar="T", help="of the soft targets (2)")
    add("--label-weight", type=float, metavar="W", help="share of labels in the loss; 0.1, 0 for heads")
    add("--amp", choices=AMP, help="mixed precision; bf16 on a GPU by default, none on a CPU")
    add("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (0)")


def add_gate(parser: argparse.ArgumentParser) -> None:
    """What may be lost, and what becomes of an output that is there."""
    add = parser.add_argument
    add("--max-accuracy-loss", type=float, default=0.01, metavar="S", help="accuracy that may be lost (0.01)")
    add("--max-nll-loss", type=float, default=0.05, metavar="N", help="negative log-likelihood, in nats (0.05)")
    add("--force", action="store_true", help="write setup_config.json even if more is lost")
    add("--anew", action="store_true", help="begin again, whatever is in the output folder")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where it is computed."""
    add = parser.add_argument
    add("--workers", type=int, default=0, metavar="N", help="processes that read, decode and tokenise (0)")
    add("--threads", type=int, metavar="N", help="torch's threads; torch's own choice by default")
    add("--device", metavar="DEVICE", help="cpu, cuda:0 ...; the archive's by default")
    add("--execution", metavar="MODE", help="how both are run when they are judged; the archive's by default")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse values that make no sense, of the options that the tool has; exits with 2."""
    given = vars(options)
    for name, least in (("epochs", 1), ("patience", 1), ("batch_size", 2), ("threads", 1), ("workers", 0)):
        value = given.get(name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected {least} or more, got {value}")
    for name in ("lr", "temperature"):
        value = given.get(name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: expected a number above 0, got {value}")
    share = given.get("label_weight")
    if share is not None and not 0 <= share <= 1:
        parser.error(f"--label-weight: expected a share from 0 to 1, got {share}")
    if "held_out" in given and not 0 < options.held_out <= 0.4:
        parser.error(f"--held-out: expected a share above 0, at most 0.4, got {options.held_out}")


def has(tool: str, *packages: str) -> bool:
    """Whether what a tool needs is installed, before minutes of work; says so where it isn't."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            print(f"{tool}: needs {name}; pip install 'vmap-ensemble[{tool}]'", file=sys.stderr)
            return False
    return True


def run_tool(name: str, run: Callable[[], int]) -> int:
    """Run a command that scores what it makes; 0 done, 1 refused, 130 stopped."""
    return exit_code(name, run, "stopped; the same command goes on where it was")
