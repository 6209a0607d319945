"""The walls of the house: who may import whom, read off the code; and the library where no server is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "vmap_ensemble",
    "archiver",
    "benchmarks",
    "fastertransformer",
    "optimise",
    "quality",
    "scripts",
    "training",
)
# From the top down: a room may import those below it. `process` and `errors` serve everybody.
ROOMS = (
    *(
        "base_handler",
        "architecture",
        "mnist_net",
        "frontends",
        "client",
        "offline",
        "serving",
        "ensemble",
        "many",
        "starting",
        "description",
        "tasks",
        "encoders",
    ),
    *("execution", "archive", "models", "core", "process", "errors", "version"),
)
# The same of the archiver's; what lies beside them orders the work and reports on it.
ARCHIVER_ROOMS = ("checking", "packing", "members", "texts", "blocks")
# Who alone may import what: prefix of the module -> libraries.
ALONE = {
    "ts": ("vmap_ensemble.frontends.torchserve",),
    "ray": ("vmap_ensemble.frontends.ray_serve", "vmap_ensemble.offline.on_ray"),
    "kserve": ("vmap_ensemble.frontends.kserve",),
    "starlette": ("vmap_ensemble.frontends",),
    "uvicorn": ("vmap_ensemble.frontends.demo",),
    "transformers": ("vmap_ensemble.encoders", "vmap_ensemble.models.transformers", "vmap_ensemble.tasks.text"),
    "httpx": ("vmap_ensemble.client",),
    "grpc": ("vmap_ensemble.client", "vmap_ensemble.frontends.kserve"),
    "captum": ("vmap_ensemble.tasks.text.explanations",),
    "pydantic": (
        *("vmap_ensemble.archive", "vmap_ensemble.client.bodies"),
        *("vmap_ensemble.tasks.images.settings", "vmap_ensemble.tasks.text.settings"),
    ),
}
CORE_MAY_IMPORT = {"torch", "vmap_ensemble", "__future__", *sys.stdlib_module_names}


def find_modules() -> dict[str, Path]:
    """Dotted name -> file, of the whole project but its tests and handler files."""
    found = {}
    for folder in (ROOT / "handlers" / "vmap_ensemble", *(ROOT / name for name in PACKAGES[1:])):
        for path in folder.rglob("*.py") if folder.is_dir() else []:
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, inside functions and for types as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_rooms_import_downward_alone():
    wrong = [
        f"{module} -> {target}"
        for module, targets in IMPORTS.items()
        if room_of(module) in ROOMS and module.startswith("vmap_ensemble.")
        for target in targets
        if target.startswith("vmap_ensemble.") and ROOMS.index(room_of(target)) < ROOMS.index(room_of(module))
    ]
    assert not wrong


def test_rooms_of_the_archiver_import_downward_alone():
    rooms = {name: room_of(name) for name in MODULES if name.startswith("archiver.") and name.count(".") > 1}
    assert set(rooms.values()) == set(ARCHIVER_ROOMS)
    order = (*ARCHIVER_ROOMS, "source")
    wrong = [
        f"{module} -> {target}"
        for module, room in rooms.items()
        for target in IMPORTS[module]
        if target.startswith("archiver.") and room_of(target) not in order[order.index(room) :] and target in MODULES
    ]
    assert not wrong


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in MODULES if module.startswith("vmap_ensemble.")} <= set(ROOMS)


def test_no_circle_of_imports():
    finished: set[str] = set()
    circles = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in finished:
            for target in sorted(IMPORTS[module] & set(MODULES)):
                visit(target, [*path, module])
            finished.add(module)

    for module in MODULES:
        visit(module, [])
    assert not circles


def test_core_imports_torch_alone():
    for module in (name for name in MODULES if name.startswith("vmap_ensemble.core")):
        assert {name.split(".")[0] for name in IMPORTS[module]} <= CORE_MAY_IMPORT, module


@pytest.mark.parametrize("library", ALONE)
def test_libraries_stay_in_their_rooms(library):
    users = [name for name in MODULES if name.startswith("vmap_ensemble.")]
    wrong = [
        module
        for module in users
        if any(name.split(".")[0] == library for name in IMPORTS[module]) and not module.startswith(ALONE[library])
    ]
    assert not wrong


def test_tools_import_no_front_end():
    tools = [name for name in MODULES if name.split(".")[0] in ("archiver", "optimise", "quality")]
    assert not [name for name in tools if any(".frontends" in target for target in IMPORTS[name])]


def test_no_folder_is_a_heap():
    counts: defaultdict[Path, int] = defaultdict(int)
    for path in MODULES.values():
        counts[path.parent] += path.name != "__init__.py"
    assert {
        str(folder): count
        for folder, count in counts.items()
        if ("vmap_ensemble" in str(folder) or "archiver" in str(folder)) and count > 16
    } == {}


BLOCKED = """
import sys
for name in ("ts", "ray", "kserve", "captum", "transformers", "model_archiver"):
    sys.modules[name] = None  # an import of it fails
import torch
from vmap_ensemble import Ensemble
states = {name: torch.nn.Linear(3, 2).state_dict() for name in "ab"}
ensemble = Ensemble.of(torch.nn.Linear(3, 2), states)
x = torch.randn(4, 3)
for name, outputs in zip("ab", ensemble.outputs(x)):
    own = torch.nn.functional.linear(x, states[name]["weight"], states[name]["bias"])
    torch.testing.assert_close(outputs, own, rtol=1e-5, atol=1e-6)
"""


def test_the_library_needs_no_server_and_no_transformers():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], env={"PYTHONPATH": str(ROOT / "handlers")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_costs_next_to_nothing():
    script = (
        "import sys, vmap_ensemble; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT / "handlers")}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
