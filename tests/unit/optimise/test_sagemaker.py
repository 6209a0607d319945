"""The file for SageMaker's images: what lies where, what config.yaml says, and what is asked of the image."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from archiver.command import main
from optimise.sagemaker import EXPLANATIONS, REQUIREMENTS
from vmap_ensemble.models.mnist import MnistNet

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture
def archive(make_archive, make_model) -> Path:
    states = {f"m{seed}": make_model(MnistNet, seed).state_dict() for seed in range(2)}
    return make_archive(states, {"handler": "mnist_handler.py"})


def export(archive: Path, target: Path, *options: str) -> int:
    return main(["export", str(archive), "--to", "sagemaker", "--output", str(target), *options])


def read(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode()


def test_what_lies_where(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.tar.gz"
    assert export(archive, target, "--batch-size", "16", "--cpus", "4", "--gpus", "1") == 0
    with tarfile.open(target) as tar:
        names = set(tar.getnames())
        (application,) = yaml.safe_load(read(tar, "config.yaml"))["applications"]
        assert read(tar, "code/requirements.txt").split() == list(REQUIREMENTS)
        compile(read(tar, "deployment.py"), "deployment.py", "exec")
    assert {"code/vmap_ensemble/ensemble.py", "model/setup_config.json", "model/members/m0.safetensors"} <= names
    assert not [name for name in names if "__pycache__" in name]
    assert application["import_path"] == "deployment:app"
    assert application["args"] == {"name": archive.name, "batch_size": 16}
    (deployment,) = application["deployments"]
    assert (deployment["name"], deployment["ray_actor_options"]) == (archive.name, {"num_cpus": 4, "num_gpus": 1})


def test_captum_is_asked_for_texts_alone(archive: Path, tmp_path: Path) -> None:
    (archive / "pretrained").mkdir()
    assert export(archive, tmp_path / "model.tar.gz") == 0
    with tarfile.open(tmp_path / "model.tar.gz") as tar:
        assert read(tar, "code/requirements.txt").split() == [*REQUIREMENTS, EXPLANATIONS]


def test_what_is_asked_of_the_image_is_what_the_library_wants() -> None:
    ranges = PYPROJECT.read_text(encoding="utf-8")
    for line in (*REQUIREMENTS, EXPLANATIONS):
        assert Requirement(line).specifier
        assert f'"{line}"' in ranges


def test_refusals(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.tar.gz"
    with pytest.raises(SystemExit):
        export(archive, tmp_path / "model.zip")
    assert "expected a name that ends in .tar.gz, got model.zip" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(archive, target, "--cpus", "0")
    assert "--cpus: expected 1 or more, got 0" in capsys.readouterr().err
    assert export(archive.rename(tmp_path / "two words"), target) == 1
    assert "two words: expected a name of letters" in capsys.readouterr().err
    archive = (tmp_path / "two words").rename(archive)
    target.write_bytes(b"old")
    assert export(archive, target) == 1
    assert capsys.readouterr().err == "export: model.tar.gz: exists; --force replaces it\n"
    assert export(tmp_path / "nothing.mar", target, "--force") == 1
    assert target.read_bytes() == b"old"
    assert export(archive, target, "--force") == 0
    assert tarfile.is_tarfile(target)
