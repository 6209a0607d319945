"""Every Python block of docs/library.md and README.md runs, in order, on archives built by the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from archiver.__main__ import main
from archiver.command import main as command
from vmap_ensemble.models.mnist import MnistNet

pytest.importorskip("transformers")
pytest.importorskip("captum.attr")
import transformers

from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the archives that the page names, of tiny members, and the repository's digits."""
    for seed in range(3):
        torch.manual_seed(seed)
        (tmp_path / "mnist").mkdir(exist_ok=True)
        torch.save(MnistNet().state_dict(), tmp_path / "mnist" / f"seed{seed}.pt")
    config = CONFIGS["bert"](num_labels=3)
    for name, model in random_members("sequence_classification", config, 2).items():
        model.save_pretrained(tmp_path / "bert" / name)
        save_tokenizer(tmp_path / "bert" / name, token_types=True)
    blocks = {
        "mnist_ens": {"handler": "mnist_handler.py", "members": ["mnist"]},
        "bert_ens": {"handler": "bert_handler.py", "members": ["bert"], "max_length": 32},
    }
    for block in blocks.values():
        block["execution"] = "eager"
    (tmp_path / "setup_config.json").write_text(json.dumps(blocks))
    shutil.copytree(ROOT / "data" / "digits", tmp_path / "data" / "digits")
    monkeypatch.chdir(tmp_path)
    assert main(["--all", "--no-check", "--config", "setup_config.json", "--output", "model_store"]) == 0
    return tmp_path


def test_blocks_of_the_pages_run_as_written(project, capsys):
    space: dict = {"__name__": "page"}
    for file in ("README.md", "docs/library.md", "docs/offline.md"):
        page = (ROOT / file).read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(compile(block, file, "exec"), space)
    shown = capsys.readouterr().out
    assert "member   seed0" in shown
    assert '"uncertainty"' in shown
    assert space["outputs"].shape == (3, 8, 10)
    assert transformers.__version__


def test_the_page_of_exports_runs_as_written(project):
    pytest.importorskip("onnxruntime")
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ *vmap-ensemble (export .*)$", page, re.M)
    assert set(re.findall(r"^ *vmap-ensemble (export .*)$", (ROOT / "docs/moving.md").read_text(), re.M)) <= {*lines}
    for line in lines:
        assert command(shlex.split(line)) == 0
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    space: dict = {}
    exec(compile(block, "docs/export.md", "exec"), space)
    assert space["found"]["probabilities"].shape == (8, 10)


@pytest.mark.parametrize("file", ["README.md", "docs/offline.md", "docs/moving.md"])
def test_the_command_for_a_folder_runs_as_written(project, file):
    page = (ROOT / file).read_text(encoding="utf-8")
    (line,) = re.findall(r"^ *vmap-ensemble (predict .*)$", page, re.M)
    assert command(shlex.split(line)) == 0
    answers = [json.loads(row) for row in Path("answers.jsonl").read_text().splitlines()]
    assert [row["input"] for row in answers] == [f"{digit}.png" for digit in range(10)]
    assert all(row["answer"]["prediction"]["label"] for row in answers)
