"""An archive with its forward as native code: what is in it, that it serves the members' values, what is refused."""

import json
import shutil

import pytest
import torch
from torch._inductor import cpp_builder, exc

pytest.importorskip("ts")

from ts.context import Context, RequestProcessor

from tests.archive.conftest import HANDLER, MODEL, Project, tiny_state
from vmap_ensemble.archive.manifest import load_members
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.compiled.packages import (
    CompiledForward,
    CompiledMismatch,
    read_compiled,
    target_here,
    write_compiled,
)
from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The tiny project's archive, unpacked, compiled for batches of 1 and of up to 4; made once, it takes long."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "model.py").write_text(MODEL)
    (folder / "tiny_handler.py").write_text(HANDLER)
    (folder / "config.yaml").write_text("batchSize: 4\n")
    project = Project(folder)
    for seed in range(2):
        project.save(f"m{seed}.pt", tiny_state(seed))
    project.block(model_config="config.yaml")
    assert project.run("tiny", "--compile") == 0
    return project.unpack()


@pytest.fixture
def unpacked(compiled, tmp_path):
    return shutil.copytree(compiled, tmp_path / "unpacked")


def serve(folder, **settings):
    """A handler on the unpacked archive, as a worker makes it."""
    path = folder / "setup_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    handler = VmapEnsembleHandler()
    context = Context("tiny", str(folder), {}, 1, None, "0.12", model_yaml_config={"batchSize": 4})
    handler.initialize(context)
    context.request_processor = [RequestProcessor({})]
    return handler


def retarget(folder, **changes):
    """Pretend that the code was compiled for something else."""
    target, packages = read_compiled(folder)
    write_compiled(folder, type(target)(**{**vars(target), **changes}), packages)


@needs_compiler
@pytest.mark.timeout(300)
def test_the_archive_serves_its_native_code(unpacked):
    _, packages = read_compiled(unpacked)
    assert [(p.file, p.smallest, p.largest) for p in packages] == [
        ("compiled/batch-1-1.pt2", 1, 1),
        ("compiled/batch-2-4.pt2", 2, 4),
    ]
    handler = serve(unpacked, execution="compiled")
    assert isinstance(handler.ensemble.execution.run, CompiledForward)
    for batch in (1, 2, 3, 4, 9):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(handler.ensemble.run(x), handler.ensemble.forward.loop(x), rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.timeout(300)
def test_auto_measures_it_as_a_candidate(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr("vmap_ensemble.starting.CACHE", tmp_path)
    candidates = {candidate.name: candidate for candidate in serve(unpacked).ensemble.execution.candidates}
    assert candidates["compiled"].latency_ms
    assert candidates["compiled"].refused is None


WRONG = {
    "torch": ("1.0", "torch: compiled for 1.0, here it is"),
    "architecture": ("vax", "architecture: compiled for vax"),
    "features": (("avx9",), "for a processor with avx9, which this one lacks"),
    "device": ("cuda", "device: compiled for cuda, here it is cpu"),
    "dtype": ("float16", "dtype: compiled for float16, here it is float32"),
    "example": ((4,), r"example: compiled for \(4,\), here it is \(3,\)"),
    "members": (("x", "y"), "members: compiled with other members"),
}


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WRONG)
def test_code_for_something_else_is_refused(unpacked, name):
    value, message = WRONG[name]
    retarget(unpacked, **{name: value})
    with pytest.raises(CompiledMismatch, match=message):
        serve(unpacked, execution="compiled")


@needs_compiler
@pytest.mark.timeout(300)
def test_under_auto_a_mismatch_is_a_reason_and_is_counted(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr("vmap_ensemble.starting.CACHE", tmp_path)
    recorded = []
    monkeypatch.setattr(
        "vmap_ensemble.frontends.torchserve.metrics.Metrics.record", lambda self, *row: recorded.append(row)
    )
    retarget(unpacked, torch="1.0")
    handler = serve(unpacked)
    (candidate,) = [c for c in handler.ensemble.execution.candidates if c.name == "compiled"]
    assert "compiled for 1.0" in candidate.refused
    assert ("EnsembleFallbacks", 1, "compiled refused") in recorded


@needs_compiler
@pytest.mark.timeout(300)
def test_changed_code_is_not_run(unpacked):
    path = unpacked / "compiled" / "batch-1-1.pt2"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(LoadError, match=r"batch-1-1\.pt2: changed after it was archived"):
        serve(unpacked, execution="compiled")
    path.unlink()
    with pytest.raises(LoadError, match=r"batch-1-1\.pt2: missing"):
        serve(unpacked, execution="compiled")
    (unpacked / "compiled" / "compiled.json").write_text("{")
    with pytest.raises(LoadError, match=r"compiled\.json: malformed"):
        serve(unpacked, execution="compiled")


def test_without_a_compiler_nothing_is_begun(project, monkeypatch, capsys):
    def find_none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)
    assert project.run("tiny", "--compile") == 1
    assert "needs a C++ compiler" in capsys.readouterr().err
    assert project.leftovers() == []


@needs_compiler
def test_a_model_of_several_outputs_is_refused(project, capsys):
    text = (project.folder / "model.py").read_text()
    (project.folder / "model.py").write_text(text.replace(".relu())", ".relu()), x"))
    assert project.run("tiny", "--compile") == 1
    assert "expected a model in floating point" in capsys.readouterr().err
    assert project.leftovers() == []


def test_the_target_names_what_code_depends_on(project):
    assert project.run("tiny") == 0
    folder = project.unpack()
    here = target_here(load_members(folder), (3,))
    assert (here.torch, here.device, here.dtype, here.example) == (torch.__version__, "cpu", "float32", (3,))
    assert len(here.members) == 2
    here.check(here)
