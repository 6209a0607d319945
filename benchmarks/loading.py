"""Turns an archive of N members into figures of its loading: seconds per phase, and peak memory against the bound.

    python -m benchmarks.loading --architecture resnet18 --members 8 --json loading.json

The bound: peak resident memory while loading is at most the stack plus one member plus the interpreter with its
imports. Members differ in every weight; a fresh process loads them with the code that a worker runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import describe_machine, write_json

CHILD = """
import json, sys, time
start = time.perf_counter()
from ts.context import Context, RequestProcessor
from resnet_handler import ResNetHandler
imported = time.perf_counter()
from vmap_ensemble.members import load_members
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
folder, tiny = sys.argv[1:]
# Code is paged in when it first runs: a tiny archive brings the loader's own pages into the base figure.
load_members(tiny)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
base = status("VmRSS")
members = load_members(folder)
peak = status("VmHWM")
size = members.size_bytes() / 2**20
one = sum(t[0].numel() * t.element_size() for t in members.stacked.values()) / 2**20
del members
handler = ResNetHandler()
context = Context("ens", folder, {}, 1, None, "0.12", model_yaml_config={})
handler.initialize(context)
context.request_processor = [RequestProcessor({})]
asked = time.perf_counter()
shape = handler.input_shape
handler.handle([{"body": [[[0.0] * shape[2]] * shape[1]] * shape[0]}], context)
answered = time.perf_counter() - asked
phases = {**handler.phases_s, "import": imported - start, "first_request": answered}
print(json.dumps({"base_mib": base, "peak_mib": peak, "stack_mib": size, "one_member_mib": one, "phases_s": phases}))
"""


def build_folder(folder: Path, architecture: str, count: int, **options: int) -> Path:
    """Write an unpacked archive of `count` members that differ in every weight."""
    from safetensors.torch import save_file
    from torchvision.models import get_model

    from vmap_ensemble.members import Manifest, Member, hash_file

    (folder / "members").mkdir(parents=True)
    rows = []
    for index in range(count):
        torch.manual_seed(index)
        path = folder / "members" / f"seed{index}.safetensors"
        save_file(get_model(architecture, weights=None, **options).state_dict(), path)
        file = f"members/{path.name}"
        rows.append(Member(f"seed{index}", file, hash_file(path), path.name, path.stat().st_size))
    (folder / "members.json").write_text(Manifest(tuple(rows)).to_json())
    settings = {"name": architecture, "architecture": f"torchvision:{architecture}"}
    (folder / "setup_config.json").write_text(json.dumps(settings))
    return folder


def load_once(folder: Path, tiny: Path) -> dict[str, Any]:
    """Load the folder in a fresh process and return its figures."""
    handlers = Path(__file__).resolve().parent.parent / "handlers"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tiny)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(handlers), "PATH": "/usr/bin:/bin"},
    )
    if done.returncode:
        raise SystemExit(f"loading failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the bound that the peak is held against."""
    median = {
        key: statistics.median(run[key] for run in runs)
        for key in ("base_mib", "peak_mib", "stack_mib", "one_member_mib")
    }
    bound_mib = median["base_mib"] + median["stack_mib"] + median["one_member_mib"]
    phases = {name: statistics.median(run["phases_s"][name] for run in runs) for name in runs[0]["phases_s"]}
    return {**median, "bound_mib": bound_mib, "holds": median["peak_mib"] <= bound_mib, "phases_s": phases}


def main() -> int:
    """Print and write the figures; exit 1 when the peak exceeds the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet18", help="torchvision's name of it (default: %(default)s)")
    parser.add_argument("--members", type=int, default=8, help="number of members (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(Path(temporary) / "big", arguments.architecture, arguments.members)
        tiny = build_folder(Path(temporary) / "tiny", "squeezenet1_1", 2, num_classes=2)
        figures = summarise([load_once(folder, tiny) for _ in range(arguments.runs)])
    print(f"{arguments.members} x {arguments.architecture}, median of {arguments.runs} fresh processes")
    for name, seconds in figures["phases_s"].items():
        print(f"  {name:<16} {seconds:8.3f} s")
    for name in ("base_mib", "stack_mib", "one_member_mib", "peak_mib", "bound_mib"):
        print(f"  {name:<16} {figures[name]:8.1f} MiB")
    print(f"  peak within base + stack + one member: {'yes' if figures['holds'] else 'NO'}")
    if arguments.json:
        machine = describe_machine(torch.device("cpu"))
        facts = {"architecture": arguments.architecture, "members": arguments.members, **figures}
        write_json(arguments.json, machine, [], table="loading", **facts)
    return 0 if figures["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
