"""The wheel of the repository: what is in it, and what it does where no server and no repository is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # what pytest itself reads pyproject.toml with

ROOT = Path(__file__).resolve().parents[2]
HANDLERS = ("bert_handler.py", "ft_bert_handler.py", "mnist_handler.py", "resnet_handler.py")
# Package -> its folder, as [tool.setuptools] package-dir has it.
FOLDERS = {
    "vmap_ensemble": ROOT / "handlers" / "vmap_ensemble",
    "archiver": ROOT / "archiver",
    "quality": ROOT / "quality",
    "fastertransformer": ROOT / "fastertransformer",
    "optimise": ROOT / "optimise",
}
PARTS = (
    *("handlers", "archiver", "optimise", "quality", "fastertransformer"),
    *("benchmarks", "training", "tests", "scripts", "data"),
)
SOURCES = (".py", ".cpp", ".h", ".typed", ".html", ".css", ".js")
# A line of a .pth that begins with `import` is run as soon as site-packages are found, before any module of ours.
BLOCK = 'import sys; sys.modules.update(dict.fromkeys(("ts", "ray", "captum", "transformers", "model_archiver")))'


def source_files() -> dict[str, Path]:
    """Name in a wheel -> file, of everything below the packages' folders that is code."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.suffix in SOURCES and "__pycache__" not in path.parts
    }


def test_no_folder_of_code_is_forgotten_in_pyproject():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name.rpartition("/")[0].replace("/", ".") for name in source_files()}
    assert folders == set(settings["packages"])
    assert {path.name for path in (ROOT / "handlers").glob("*.py")} == {f"{m}.py" for m in settings["py-modules"]}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What is built from: setuptools leaves build/ beside what it builds, and takes up what an earlier run left."""
    copy = tmp_path_factory.mktemp("copy") / "copy"
    copy.mkdir()
    for name in PARTS:
        trained = ["members"] if name == "training" else []
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", *trained)
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_all_code_of_its_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        kept = {name: archive.read(name) for name in names}
    info = f"vmap_ensemble-{__version__}.dist-info/"
    code = {name for name in names if not name.startswith(info)}
    sources = source_files()
    assert code == {*sources, *HANDLERS}
    assert all(kept[name] == path.read_bytes() for name, path in sources.items())
    assert "vmap_ensemble/py.typed" in code
    assert any(name.startswith("vmap_ensemble/execution/cpu/kernels/") and name.endswith(".cpp") for name in code)
    assert any(name.startswith("fastertransformer/csrc/") and name.endswith(".cpp") for name in code)
    assert any(name.startswith(info) and name.endswith("LICENSE-MNIST.md") for name in names)
    assert b"vmap-ensemble = archiver.command:main" in kept[f"{info}entry_points.txt"]


def test_the_source_distribution_holds_what_the_wheel_does(copy, wheel, tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = tmp_path.glob("vmap_ensemble-*.tar.gz")
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= {path.name for path in root.iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        code = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    folders = {**{name: path.relative_to(ROOT) for name, path in FOLDERS.items()}, "": Path("handlers")}
    for name, content in code.items():
        package, _, rest = name.partition("/")
        path = root / folders[package] / rest if rest else root / "handlers" / name
        assert path.read_bytes() == content, name


@dataclass
class Installed:
    """An environment with the wheel alone, and a folder that knows nothing of the repository."""

    bin: Path
    site: Path
    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment in the folder."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        kept |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = (str(self.bin / command[0]), *command[1:])
        return subprocess.run(command, cwd=self.folder, env=kept, capture_output=True, text=True, check=False)

    def python(self, code: str) -> str:
        """What lines of Python print."""
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("elsewhere")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    made = Installed(venv / "bin", Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)})), folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(venv / "bin" / "python")]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # torch and the like come from here, behind what the wheel brings; .pth files over there aren't read.
    libraries = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (made.site / "libraries.pth").write_text("\n".join([BLOCK, *libraries]) + "\n")
    return made


def tiny_mnist(seed: int) -> MnistNet:
    torch.manual_seed(seed)
    return MnistNet().eval()


@pytest.fixture(scope="module")
def archived(installed) -> Installed:
    """An archive of two MNIST members, built by the command in a folder with a setup_config.json of its own."""
    for seed in range(2):
        torch.save(tiny_mnist(seed).state_dict(), installed.folder / f"m{seed}.pt")
    block = {"handler": "mnist_handler.py", "members": ["m0.pt", "m1.pt"], "execution": "eager"}
    (installed.folder / "setup_config.json").write_text(json.dumps({"digits": block}))
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(installed.folder / "digit.png")
    done = installed.run("vmap-ensemble", "archive", "digits")
    assert done.returncode == 0, done.stdout + done.stderr
    return installed


def test_the_wheel_is_what_is_imported_and_no_server_can_be(installed):
    shown = installed.python("import vmap_ensemble, archiver; print(vmap_ensemble.__file__, archiver.__file__)")
    assert all(Path(path).is_relative_to(installed.site) for path in shown.split())
    for name in ("ts", "ray", "captum", "transformers", "model_archiver"):
        done = installed.run("python", "-c", f"import {name}")
        assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr


def test_importing_it_imports_no_torch(installed):
    code = "import sys, vmap_ensemble; print(vmap_ensemble.__version__, 'torch' in sys.modules)"
    assert installed.python(code) == f"{__version__} False"


def test_the_command_tells_its_version_and_its_commands(installed):
    assert installed.run("vmap-ensemble", "--version").stdout == f"vmap-ensemble {__version__}\n"
    shown = installed.run("vmap-ensemble", "--help")
    assert shown.returncode == 0
    rows = [line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")]
    assert {"archive", "check", "list", "health"} <= set(rows)
    for name in rows:
        assert installed.run("vmap-ensemble", name, "--help").returncode == 0
    assert installed.run("vmap-ensemble", "nothing").returncode == 2


def test_an_archive_is_built_where_the_caller_is_and_answers_there(archived):
    with zipfile.ZipFile(archived.folder / "model_store" / "digits.mar") as archive:
        names = archive.namelist()
    assert "mnist_handler.py" in names
    assert "vmap_ensemble/ensemble.py" in names
    assert "digits" in archived.run("vmap-ensemble", "list").stdout
    done = archived.run("vmap-ensemble", "check", "model_store/digits.mar", "digit.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"prediction"' in done.stdout


LINES = """
import json, torch
from pathlib import Path
from vmap_ensemble import Ensemble
ensemble = Ensemble.load("model_store/digits.mar")
(answer,) = ensemble.predict([Path("digit.png")])
items = [Path("digit.png")]
print(json.dumps({
    "answer": json.loads(answer.to_json()), "outputs": ensemble.outputs(items).tolist(),
    "probabilities": ensemble.probabilities(items).tolist(), "description": str(ensemble.describe()),
}))
"""


def test_the_library_gives_what_the_plain_loop_gives(archived):
    shown = json.loads(archived.python(LINES))
    pixels = np.asarray(Image.open(archived.folder / "digit.png"), dtype=np.float32)
    x = ((torch.from_numpy(pixels) / 255 - 0.1307) / 0.3081)[None, None]
    with torch.no_grad():
        outputs = torch.stack([tiny_mnist(seed)(x) for seed in range(2)])  # (2, 1, 10) log-probabilities
    mean = outputs.exp().mean(0)
    torch.testing.assert_close(torch.tensor(shown["outputs"]), outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(shown["probabilities"]), mean, rtol=1e-4, atol=1e-6)
    assert shown["answer"]["prediction"]["index"] == int(mean.argmax())
    assert shown["answer"]["prediction"]["probability"] == pytest.approx(float(mean.max()), rel=1e-4)
    assert shown["answer"]["ensemble"] == {"size": 2, "used": 2}
    assert "m0" in shown["description"]
    assert "eager" in shown["description"]


OF = """
import torch
from torch import nn
from vmap_ensemble import Ensemble
states = {name: nn.Linear(3, 2).state_dict() for name in "ab"}
ensemble = Ensemble.of(nn.Linear(3, 2), states)
x = torch.randn(4, 3)
own = torch.stack([nn.functional.linear(x, state["weight"], state["bias"]) for state in states.values()])
print(tuple(ensemble.outputs(x).shape), torch.allclose(ensemble.outputs(x), own, atol=1e-5))
"""


def test_state_dicts_in_memory_need_no_archive(installed):
    assert installed.python(OF) == "(2, 4, 2) True"
