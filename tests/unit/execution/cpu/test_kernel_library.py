"""The kernels' library is made once, found in an archive first, and missed with one clear line."""

import logging

import pytest
import torch

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu import kernel_library
from vmap_ensemble.execution.cpu.kernel_library import (
    INSTRUCTION_SETS,
    build_library,
    instruction_set,
    load_library,
    runs_kernels,
)

AVX2 = INSTRUCTION_SETS["AVX2"]
pytestmark = pytest.mark.skipif(not runs_kernels(), reason="no kernels for this machine")


@pytest.fixture
def made():
    """The library for AVX2, made while there is a compiler."""
    return build_library(AVX2, kernel_library.CACHE).read_bytes()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_it_is_made_once(tmp_path, monkeypatch):
    path = build_library(AVX2, tmp_path / "new")
    assert [path] == list((tmp_path / "new").iterdir())  # nothing else is left there
    monkeypatch.setenv("PATH", "")
    assert build_library(AVX2, tmp_path / "new") == path


def test_another_source_or_instruction_set_is_another_file(tmp_path, monkeypatch):
    names = {target.file for target in INSTRUCTION_SETS.values()}
    for source in kernel_library.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes() + b"// changed\n")
    monkeypatch.setattr(kernel_library, "SOURCES", tmp_path)
    assert len(names | {target.file for target in INSTRUCTION_SETS.values()}) == 2 * len(INSTRUCTION_SETS)


def test_without_a_compiler_the_error_says_what_is_expected(tmp_path, no_compiler):
    with pytest.raises(LoadError, match=r"no C\+\+ compiler: expected g\+\+ 9 or newer on the path"):
        build_library(AVX2, tmp_path)


def test_a_compiler_that_fails_is_named_with_its_first_error(tmp_path, monkeypatch):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho in the kitchen >&2\necho 'error: no eggs' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(LoadError, match="cxx failed with status 3: error: no eggs"):
        build_library(AVX2, tmp_path / "new")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LoadError, match="can't be written: Not a directory"):
        build_library(AVX2, tmp_path / "file" / "new")


def test_a_library_is_missed_with_one_line(monkeypatch, tmp_path, caplog, no_compiler):
    monkeypatch.setattr(kernel_library, "CACHE", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with caplog.at_level(logging.WARNING):
        assert load_library.__wrapped__() is None
    assert caplog.messages == [
        "convolutions, single rows and encoders run without kernels of our own: no C++ compiler: "
        "expected g++ 9 or newer on the path, or the variable CXX naming one"
    ]


def test_an_archive_brings_its_own(made, monkeypatch, tmp_path, no_compiler):
    for source in kernel_library.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (tmp_path / AVX2.file).write_bytes(made)
    monkeypatch.setattr(kernel_library, "SOURCES", tmp_path)
    monkeypatch.setattr(kernel_library, "CACHE", tmp_path / "none")
    assert load_library.__wrapped__()._name == str(tmp_path / AVX2.file)


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [("AVX512", {"avx512_vnni"}, "AVX512_VNNI"), ("AVX512", set(), "AVX512"), ("AVX2", {"avx512_vnni"}, "AVX2")],
)
def test_products_of_8_bits_are_a_set_of_their_own(monkeypatch, name, flags, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    monkeypatch.setattr(kernel_library, "_cpu_flags", lambda: flags)
    assert instruction_set() is INSTRUCTION_SETS[expected]


@pytest.mark.parametrize("name", ["DEFAULT", "NEON"])
def test_other_cpus_have_none(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    assert instruction_set() is None
    assert load_library.__wrapped__() is None
