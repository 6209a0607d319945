"""Archives of random members -> seconds per phase of their loading, and peak memory against the bound."""

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

from benchmarks.measuring.measure import describe_machine, write_json
from benchmarks.options import ROOT

CHILD = """
import json, sys, time
start = time.perf_counter()
from ts.context import Context, RequestProcessor
from resnet_handler import ResNetHandler
imported = time.perf_counter()
from vmap_ensemble.archive.manifest import load_members
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
folder, tiny, batch = sys.argv[1:]
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
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
handler = ResNetHandler()
context = Context("ens", folder, {}, 1, None, "0.12", model_yaml_config={"batchSize": int(batch)})
handler.initialize(context)
served_mib, served_peak_mib = status("VmRSS"), status("VmHWM")
context.request_processor = [RequestProcessor({})]
asked = time.perf_counter()
shape = handler.input_shape
handler.handle([{"body": [[[0.0] * shape[2]] * shape[1]] * shape[0]}], context)
answered = time.perf_counter() - asked
phases = {**handler.phases_s, "import": imported - start, "first_request": answered}
print(json.dumps({
    "base_mib": base, "peak_mib": peak, "stack_mib": size, "one_member_mib": one, "phases_s": phases,
    "served_mib": served_mib, "served_peak_mib": served_peak_mib,
    "serves": handler.ensemble.execution.name, "reason": handler.ensemble.execution.reason,
}))
"""


def build_folder(folder: Path, architecture: str, count: int, **options: int) -> Path:
    """Write an unpacked archive of `count` members that differ in every weight."""
    from safetensors.torch import save_file
    from torchvision.models import get_model

    from vmap_ensemble.archive.manifest import Manifest, hash_file
    from vmap_ensemble.core.members import Member

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


def load_once(folder: Path, tiny: Path, batch: int, cache: Path) -> dict[str, Any]:
    """Load the folder in a fresh process and return its figures."""
    handlers = ROOT / "handlers"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tiny), str(batch)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(handlers), "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache)},
    )
    if done.returncode:
        raise SystemExit(f"loading failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


# Linux keeps what a process holds in one counter per core, and adds them up only when they exceed 32 pages or more
# (percpu_counter_batch): a reading is that far from the truth on a small machine, and further on a large one.
COUNTED_MIB = 1.0
MEMORY = ("base_mib", "stack_mib", "one_member_mib", "peak_mib", "served_mib", "served_peak_mib")


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the bound that the peak is held against."""
    median = {key: statistics.median(run[key] for run in runs) for key in MEMORY}
    bound_mib = median["base_mib"] + median["stack_mib"] + median["one_member_mib"]
    return {
        **median,
        "bound_mib": bound_mib,
        "holds": median["peak_mib"] <= bound_mib + COUNTED_MIB,
        **summarise_phases(runs),
    }


def summarise_phases(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of each phase, and what the last run serves."""
    phases = {name: statistics.median(run["phases_s"][name] for run in runs) for name in runs[0]["phases_s"]}
    return {"phases_s": phases, "serves": runs[-1]["serves"], "reason": runs[-1]["reason"]}


def print_phases(title: str, first: dict[str, Any], later: dict[str, Any]) -> None:
    """A table: phase, seconds at the first start, seconds at later ones."""
    print(f"{title}\n  {'':<16} {'first':>8} {'later':>8}")
    for name, seconds in first["phases_s"].items():
        print(f"  {name:<16} {seconds:8.3f} {later['phases_s'].get(name, 0.0):8.3f} s")
    print(f"  {'sum':<16} {sum(first['phases_s'].values()):8.3f} {sum(later['phases_s'].values()):8.3f} s")
    print(f"  serves {later['serves']}: {later['reason']}")


def measure(folder: Path, tiny: Path, runs: int, batch: int, cache: Path) -> dict[str, Any]:
    """Load in fresh processes: once without a kept choice, then `runs` times with it."""
    first, *later = [load_once(folder, tiny, batch, cache) for _ in range(runs + 1)]
    figures = {**summarise(later), "first": summarise_phases([first])}
    print_phases(f"in a process of its own; later: median of {runs}", figures["first"], figures)
    for name in (*MEMORY, "bound_mib"):
        print(f"  {name:<16} {figures[name]:8.1f} MiB")
    print(f"  peak within base + stack + one member: {'yes' if figures['holds'] else 'NO'}")
    return figures


def measure_served(folder: Path, work: Path, runs: int, batch: int) -> dict[str, Any]:
    """Start real TorchServes on the members: once without a kept choice, then `runs` times with it."""
    from benchmarks.served_start import pack_folder

    archive = pack_folder(folder, work / "ens.mar", batch)
    return _measure_starts("real TorchServe", archive, work / "served-cache", runs)


def measure_other(folder: Path, work: Path, runs: int, batch: int, handlers: Path, ours: dict[str, Any]) -> Any:
    """Start another version's handlers on the same members, as often; a table of the seconds until READY.

    Args:
        folder: The members' unpacked archive.
        work: Scratch.
        runs: Starts with a kept choice; a version that keeps none measures anew each time.
        batch: batchSize of the worker.
        handlers: The other version's handlers/.
        ours: What `measure_served` gave.
    """
    from benchmarks.served_start import pack_folder

    archive = pack_folder(folder, work / "other.mar", batch, handlers)
    other = _measure_starts("other version", archive, work / "other-cache", runs)
    pairs = {"first start": (ours["first"]["ready_s"], other["first"]["ready_s"])}
    pairs["kept choice"] = ours["ready_s"], other["ready_s"]
    for name, (own_s, other_s) in pairs.items():
        print(f"  READY, {name:<12} {own_s:8.2f} s, the other {other_s:.2f} s: {own_s / other_s:.2f} of it")
    return other


def _measure_starts(title: str, archive: Path, cache: Path, runs: int) -> dict[str, Any]:
    from benchmarks.served_start import serve_once

    first, *later = [serve_once(archive, cache) for _ in range(runs + 1)]
    figures = {**summarise_phases(later), "first": summarise_phases([first])}
    figures["ready_s"] = statistics.median(run["ready_s"] for run in later)
    print_phases(f"{title}, until READY; later: median of {runs}", figures["first"], figures)
    figures["first"]["ready_s"] = first["ready_s"]
    return figures


def run(options: argparse.Namespace) -> int:
    """Print and write the figures; exit 1 when the peak exceeds the bound."""
    runs, batch = options.runs, options.batch
    print(f"{options.members} x {options.architecture}, batchSize {batch}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = build_folder(work / "big", options.architecture, options.members)
        tiny = build_folder(work / "tiny", "squeezenet1_1", 2, num_classes=2)
        figures = measure(folder, tiny, runs, batch, work / "cache")
        if options.served:
            figures["served"] = measure_served(folder, work, runs, batch)
            if options.against:
                figures["other"] = measure_other(folder, work, runs, batch, options.against, figures["served"])
    if options.json:
        machine = describe_machine(torch.device("cpu"))
        facts = {"architecture": options.architecture, "members": options.members, "batch": batch, **figures}
        write_json(options.json, machine, [], table="loading", **facts)
    return 0 if figures["holds"] else 1
