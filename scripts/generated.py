"""Turns pages that code writes into a command: it writes them, or exits 1 where one is out of date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def write_or_check(
    pages: Mapping[str, Callable[[], str]], command: str, description: str | None, folder: Path = DOCS
) -> int:
    """Run a command line that takes `--check` alone.

    Args:
        pages: File name below the folder -> what makes its text.
        command: What is run to write them, for the message.
        description: Of the command.
        folder: Where the files are.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    code = 0
    for name, make in pages.items():
        path, text = folder / name, make()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)} is out of date; run {command}", file=sys.stderr)
            code = 1
    return code
