"""Turns the curl lines of a page into answers of a server that stands elsewhere and calls its model otherwise."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from scripts.private_torchserve import ROOT


def ask_as_written(page: str, address: str, url: str, name: str) -> list[dict[str, Any]]:
    """Run the lines of a page that ask `address`, in the repository's root; the JSON that each prints.

    Args:
        page: Such as docs/kserve.md.
        address: As the page has it.
        url: Where the server is.
        name: What it calls the model that is `ens` on the page.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for line in re.findall(r"^ *(curl .*)$", text, re.M) if address in line]
    answers = []
    for line in lines:
        asked = re.sub(r"/ens\b", f"/{name}", line.replace(address, url))
        done = subprocess.run(["bash", "-c", f"{asked} -sS --fail"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        answers.append(json.loads(done.stdout))
    return answers
