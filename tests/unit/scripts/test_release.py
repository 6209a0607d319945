"""What a release says of itself: one version everywhere, and pins that agree."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

from vmap_ensemble.version import __version__

ROOT = Path(__file__).resolve().parents[3]


def read_pins(path: Path) -> dict[str, set[str]]:
    """Package -> its pinned versions, one for each range of Pythons."""
    pins: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "-r")):
            wanted = Requirement(line)
            (pin,) = wanted.specifier
            assert pin.operator == "==", f"{path.name}: expected an exact version, got {line}"
            pins.setdefault(wanted.name.lower().replace("_", "-").replace(".", "-"), set()).add(pin.version)
    return pins


def test_the_changelog_begins_with_this_version() -> None:
    (newest, *_) = re.findall(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[0] == __version__
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}|unreleased", newest[1])


def test_constraints_hold_every_pin() -> None:
    constraints = read_pins(ROOT / "constraints.txt")
    files = sorted(ROOT.glob("requirements*.txt"))
    assert files
    for path in files:
        for name, versions in read_pins(path).items():
            assert versions <= constraints.get(name, set()), f"{path.name}: {name}: write constraints.txt anew"
