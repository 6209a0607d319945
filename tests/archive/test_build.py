"""What is in a .mar, what is refused, and that a failed run leaves the old archive alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from archiver import ROOT as REPOSITORY
from archiver.packing import kernels, pack
from tests.archive.conftest import HANDLER, Project, tiny_state
from vmap_ensemble.archive.manifest import hash_file, load_members, read_manifest
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.kernel_library import INSTRUCTION_SETS, SOURCES, runs_kernels


def test_the_archive_holds_what_the_handler_needs(project: Project, capsys) -> None:
    assert project.run("tiny") == 0
    with zipfile.ZipFile(project.mar) as archive:
        infos = archive.infolist()
    names = {info.filename for info in infos}
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    package = REPOSITORY / "handlers" / "vmap_ensemble"
    assert {f"vmap_ensemble/{path.relative_to(package)}" for path in package.rglob("*.py")} <= names
    assert {name for name in names if not name.startswith("vmap_ensemble/")} == {
        *("tiny_handler.py", "model.py", "setup_config.json", "members.json", "MAR-INF/MANIFEST.json"),
        "model-config.yaml",
        *("members/m0.safetensors", "members/m1.safetensors", "members/shared.safetensors"),
    }
    output = capsys.readouterr().out
    assert "2 (64 B) are identical" in output
    assert hash_file(project.mar) in output.replace("\n", "")
    assert project.leftovers() == ["tiny.mar"]


def test_what_comes_out_is_what_went_in(project: Project) -> None:
    project.run("tiny")
    folder = project.unpack()
    members = load_members(folder)
    assert members.names == ("m0", "m1")
    assert set(members.shared) == {"trunk.weight", "trunk.bias"}
    for seed in range(2):
        for key, tensor in tiny_state(seed).items():
            got = members.shared[key] if key in members.shared else members.stacked[key][seed]
            assert torch.equal(got, tensor)
    assert [member.source for member in members.members] == ["m0.pt", "m1.pt"]
    assert members.members[0].source_sha256 == hash_file(project.folder / "m0.pt")
    assert members.members[0].sha256 == hash_file(folder / "members/m0.safetensors")


@pytest.mark.skipif(not runs_kernels(), reason="no kernels for this machine")
def test_kernels_are_packed_for_each_instruction_set(project: Project) -> None:
    project.run("tiny")
    folder = project.unpack() / "vmap_ensemble/execution/cpu/kernels"
    packed = {target.file for target in INSTRUCTION_SETS.values()}
    assert {path.name for path in folder.iterdir()} == packed | {path.name for path in SOURCES.iterdir()}
    for file in packed:
        assert (folder / file).read_bytes()[:4] == b"\x7fELF"


def test_without_a_compiler_the_archive_says_what_it_lacks(project: Project, capsys, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise LoadError("no C++ compiler")

    monkeypatch.setattr(kernels, "runs_kernels", lambda: True)
    monkeypatch.setattr(kernels, "build_library", fail)
    assert project.run("tiny") == 0
    assert "without kernels of our own, so convolutions will be slower: no C++ compiler" in capsys.readouterr().out
    assert not list((project.unpack() / "vmap_ensemble/execution/cpu/kernels").glob("*.so"))


def test_settings_are_flat_and_tell_no_path(project: Project) -> None:
    project.run("tiny")
    folder = project.unpack()
    assert json.loads((folder / "setup_config.json").read_text()) == {
        **{"name": "tiny", "handler": "tiny_handler.py", "architecture": "model.py", "input_shape": [3]},
    }
    manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "tiny_handler.py"
    for path in ("setup_config.json", "members.json", "MAR-INF/MANIFEST.json"):
        assert str(project.folder) not in (folder / path).read_text()


def test_labels_config_and_extra_files_go_along(project: Project) -> None:
    (project.folder / "names.json").write_text('{"0": "no", "1": "yes"}')
    (project.folder / "run.yaml").write_text("minWorkers: 1\n")
    (project.folder / "data").mkdir()
    (project.folder / "data/x.txt").write_text("x")
    project.block(labels="names.json", model_config="run.yaml", extra_files=["data"], version="2.5")
    assert project.run("tiny") == 0
    folder = project.unpack()
    assert json.loads((folder / "index_to_name.json").read_text())["1"] == "yes"
    assert (folder / "data/x.txt").read_text() == "x"
    manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())["model"]
    assert (manifest["configFile"], manifest["modelVersion"]) == ("run.yaml", "2.5")


@pytest.mark.parametrize("count", [1, 5])
def test_members_of_the_command_line_replace_the_blocks(project: Project, count: int) -> None:
    files = [project.save(f"other{seed}.pth", {"state_dict": tiny_state(seed)}).name for seed in range(count)]
    assert project.run("tiny", "--members", *files) == 0
    manifest = read_manifest(project.unpack())
    assert [member.name for member in manifest.members] == [f"other{seed}" for seed in range(count)]
    assert (manifest.shared is None) == (count == 1)


def test_no_block_is_needed(project: Project) -> None:
    (project.folder / "setup_config.json").unlink()
    handler = HANDLER.replace("pass", "default_input_shape = (3,)")
    (project.folder / "tiny_handler.py").write_text(handler)
    arguments = ("--handler", "tiny_handler.py", "--model-file", "model.py", "--members", "m0.pt", "m1.pt")
    assert project.run("tiny", *arguments) == 0
    assert load_members(project.unpack()).names == ("m0", "m1")


def test_same_file_names_stay_two_members(project: Project) -> None:
    for seed in range(2):
        project.save(f"fold{seed}/model.pt", {f"module.{k}": v for k, v in tiny_state(seed).items()})
    project.block(members=["fold*/model.pt"])
    assert project.run("tiny") == 0
    folder = project.unpack()
    assert [member.name for member in read_manifest(folder).members] == ["fold0-model", "fold1-model"]
    for seed in range(2):
        got = load_file(folder / f"members/fold{seed}-model.safetensors")
        assert torch.equal(got["head.weight"], tiny_state(seed)["head.weight"])


def test_tied_weights_are_stored_once_and_survive(project: Project) -> None:
    (project.folder / "model.py").write_text(
        "from torch import nn\nclass Tied(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Linear(3, 3)\n        self.b = nn.Linear(3, 3)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n        return self.b(self.a(x))\n"
    )
    for seed in range(2):
        torch.manual_seed(seed)
        weight = torch.randn(3, 3)
        state = {"a.weight": weight, "a.bias": torch.randn(3), "b.weight": weight, "b.bias": torch.randn(3)}
        project.save(f"m{seed}.pt", state)
    assert project.run("tiny") == 0
    folder = project.unpack()
    assert "b.weight" not in load_file(folder / "members/m0.safetensors")
    members = load_members(folder)
    assert members.stacked["b.weight"] is members.stacked["a.weight"]


def test_identical_members_are_archived_with_a_warning(project: Project, capsys) -> None:
    project.save("m1.pt", tiny_state(0))
    assert project.run("tiny") == 0
    assert "all members are identical" in capsys.readouterr().out
    assert len(load_members(project.unpack()).shared) == 4


def nan_state() -> dict[str, torch.Tensor]:
    return {**tiny_state(1), "head.bias": torch.tensor([1.0, float("nan")])}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {**tiny_state(1), "head.weight": torch.ones(3, 4)},
            "m1.pt: key 'head.weight' is (3, 4) float32, Tiny",
        ),
        (
            {**tiny_state(1), "head.bias": torch.ones(2, dtype=torch.int64)},
            "m1.pt: key 'head.bias' is (2,) int64",
        ),
        ({**tiny_state(1), "x": torch.ones(1)}, "m1.pt: key 'x' ((1,) float32) is unknown to Tiny"),
        ({"head.bias": torch.ones(2)}, "m1.pt: key 'trunk.weight' is missing; Tiny expects (4, 3) float32"),
        (
            {k: v.half() for k, v in tiny_state(1).items()},
            "m1.pt: key 'trunk.weight' is (4, 3) float16, in m0.pt",
        ),
        (nan_state(), "m1.pt: key 'head.bias' holds 1 NaN or infinite values of 2; --allow-nan"),
    ],
)
def test_members_that_do_not_fit_are_refused(project: Project, second, message: str, capsys) -> None:
    project.save("m1.pt", second)
    assert project.run("tiny") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert project.leftovers() == []


def test_nan_weights_when_asked_for(project: Project) -> None:
    project.save("m1.pt", nan_state())
    assert project.run("tiny", "--allow-nan") == 0
    assert load_members(project.unpack()).stacked["head.bias"][1].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": []}, "no members: expected at least one checkpoint"),
        ({"members": 3}, "'tiny': members: expected paths as a list or as {name: path}, got 3"),
        ({"members": ["gone.pt"]}, "member 'gone.pt': no such file"),
        ({"handler": None}, "'tiny': no handler; give --handler"),
        ({"handler": "gone.py"}, "'tiny': handler 'gone.py': no such .py file"),
        ({"labels": "gone.json"}, "'tiny': gone.json: no such file"),
        ({"labels": 3}, "'tiny': labels: expected a path, got 3"),
        ({"extra_files": "x"}, "extra_files: expected a list of paths"),
        ({"extra_files": ["gone"]}, "extra file 'gone': no such file"),
        (
            {"extra_files": ["tiny_handler.py"]},
            "extra file 'tiny_handler.py': an archive has a file of that name",
        ),
        ({"temprature": 2}, "block 'tiny': unknown key 'temprature'; did you mean 'temperature'?"),
        ({"temperature": -1}, "block 'tiny': temperature: Input should be greater than 0"),
        ({"device": "cpu"}, "'device' is a worker's key"),
        ({"architecture": "resnet18"}, "architecture 'resnet18': expected 'torchvision:NAME'"),
    ],
)
def test_blocks_that_are_wrong_are_refused(project: Project, changes, message: str, capsys) -> None:
    project.block(**changes)
    assert project.run("tiny") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import gone_for_good\n",
            "importing it fails (ModuleNotFoundError: No module named 'gone_for_good'",
        ),
        (
            HANDLER + "class Second:\n    pass\n",
            "wants exactly one class in a handler file, got TinyHandler, Second",
        ),
        ("class Plain:\n    pass\n", "Plain must extend VmapEnsembleHandler"),
    ],
)
def test_handlers_that_would_not_load_are_refused(project: Project, text: str, message: str, capsys) -> None:
    (project.folder / "tiny_handler.py").write_text(text)
    assert project.run("tiny") == 1
    assert message in capsys.readouterr().err


def test_an_archive_is_replaced_only_with_force(project: Project, capsys) -> None:
    assert project.run("tiny") == 0
    before = project.mar.read_bytes()
    assert project.run("tiny") == 1
    assert "tiny.mar: exists; --force replaces it" in capsys.readouterr().err
    assert project.mar.read_bytes() == before
    project.save("m1.pt", tiny_state(7))
    assert project.run("tiny", "--force") == 0
    assert torch.equal(load_members(project.unpack()).stacked["head.bias"][1], tiny_state(7)["head.bias"])


@pytest.mark.parametrize("fails_at", ["_write_members", "list_code", "write_mar"])
def test_a_failed_run_leaves_the_old_archive(project: Project, monkeypatch, fails_at: str) -> None:
    project.run("tiny")
    before = project.mar.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, fails_at, fail)
    assert project.run("tiny", "--force") == 1
    assert project.mar.read_bytes() == before
    assert project.leftovers() == ["tiny.mar"]


def test_a_model_config_that_is_no_file_is_one_line(project: Project, capsys) -> None:
    (project.folder / "run.yaml").mkdir()
    project.block(model_config="run.yaml")
    assert project.run("tiny") == 1
    assert "run.yaml: no such file" in capsys.readouterr().err


def test_a_killed_run_leaves_the_old_archive(project: Project) -> None:
    project.run("tiny")
    before = project.mar.read_bytes()
    code = (
        "import sys, time\nfrom archiver.packing import pack\nfrom archiver.__main__ import main\n"
        "def wait(*a):\n    print('packing', flush=True)\n    time.sleep(60)\n"
        "pack.write_mar = wait\nsys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["tiny", "--force", "--config", "setup_config.json", "--output", str(project.store)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "handlers")])}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        assert any("packing" in line for line in lines)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 143
    assert project.mar.read_bytes() == before
    assert project.leftovers() == ["tiny.mar"]


def test_the_archive_is_laid_out_as_torch_model_archiver_does_it(project: Project) -> None:
    """TorchServe reads what its own archiver writes; ours writes the same names and manifest keys."""
    pytest.importorskip("model_archiver")
    (project.folder / "run.yaml").write_text("batchSize: 2\n")
    project.block(model_config="run.yaml", version="2.5")
    assert project.run("tiny") == 0
    stage = project.unpack()
    theirs = project.folder / "theirs"
    theirs.mkdir()
    extra = shutil.copytree(
        stage, project.folder / "stage", ignore=shutil.ignore_patterns("MAR-INF", "tiny_handler.py")
    )
    (extra / "run.yaml").unlink()
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "tiny", "--version", "2.5"]
    files = ["--handler", "tiny_handler.py", "--config-file", "run.yaml", "--extra-files", str(extra)]
    target = ["--archive-format", "zip-store", "--export-path", str(theirs)]
    subprocess.run([*command, *files, *target], cwd=project.folder, check=True, capture_output=True)
    read = []
    for mar in (project.mar, theirs / "tiny.mar"):
        with zipfile.ZipFile(mar) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
            read.append((names, set(manifest), manifest["model"], manifest["runtime"]))
    assert read[0] == read[1]


def test_what_is_executed_is_listed_with_its_hash(project: Project) -> None:
    assert project.run("tiny") == 0
    folder = project.unpack()
    code = json.loads((folder / "members.json").read_text())["code"]
    assert code["tiny_handler.py"] == hash_file(folder / "tiny_handler.py")
    assert set(code) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".py", ".so")}


def test_a_read_only_store_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    # Root, which tests may run as, writes everywhere: only the answer of the system is forced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert project.run("tiny") == 1
    assert "not writable" in capsys.readouterr().err


def test_a_store_that_is_a_file_is_refused(project: Project, capsys) -> None:
    project.store.write_text("")
    assert project.run("tiny") == 1
    assert "can't be made" in capsys.readouterr().err


def test_sources_may_be_read_only(project: Project) -> None:
    for path in project.folder.glob("m*.pt"):
        path.chmod(0o400)
    assert project.run("tiny") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tinny",), "'tinny' is not in setup_config.json; did you mean 'tiny'?"),
        (
            ("zebra",),
            "'zebra' is not in setup_config.json; it holds tiny. Otherwise give --handler and --members",
        ),
        (
            ("../x", "--handler", "tiny_handler.py", "--members", "m0.pt"),
            "archive name '../x': expected letters",
        ),
    ],
)
def test_names_are_checked(project: Project, arguments: tuple[str, ...], message: str, capsys) -> None:
    assert project.run(*arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [(), ("tiny", "--all"), ("--all", "--members", "m0.pt"), ("tiny", "b", "--handler", "x.py"), ("--nope",)],
)
def test_wrong_usage_exits_with_2(project: Project, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        project.run(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"tiny": 3}'])
def test_a_broken_config_is_refused(project: Project, text: str, capsys) -> None:
    (project.folder / "setup_config.json").write_text(text)
    assert project.run("--list") == 1
    assert "setup_config.json: " in capsys.readouterr().err


def test_all_and_list(project: Project, capsys) -> None:
    assert project.run("--list") == 0
    assert "not built" in capsys.readouterr().out
    assert project.run("--all") == 0
    assert project.run("--list") == 0
    assert "not built" not in capsys.readouterr().out


def test_no_network_exits_with_3(project: Project, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TORCH_HOME", str(project.folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert project.run("tiny", "--members", "torchvision:ResNet18_Weights.IMAGENET1K_V1") == 3
    assert "can't be fetched" in capsys.readouterr().err


def test_the_shell_script_names_every_option() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    start = time.monotonic()
    done = subprocess.run(
        [str(REPOSITORY / "archive.sh"), "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - start < 120
    for option in ("--members", "--handler", "--model-file", "--all", "--force", "--allow-nan", "--output"):
        assert option in done.stdout
    assert "exit codes: 0 done" in done.stdout
