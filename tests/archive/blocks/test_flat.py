"""A flat setup_config.json, as TorchServe's Hugging Face example has it, is one archive of texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from archiver.blocks.flat import read_flat
from bert_handler import BertEnsembleHandler
from tests.archive.conftest import Project
from tests.archive.texts.test_text_archives import Doubled, save_member
from vmap_ensemble.archive.manifest import read_manifest
from vmap_ensemble.errors import ArchiveError

# Keys and kinds of values as the example's file, its documentation and its users have them.
EXAMPLE: dict[str, Any] = {
    "model_name": "runs",
    "mode": "sequence_classification",
    "do_lower_case": True,
    "num_labels": "2",
    "save_mode": "pretrained",
    "max_length": "30",
    "captum_explanation": "True",
    "embedding_name": "bert",
    "FasterTransformer": "false",
    "BetterTransformer": False,
    "model_parallel": "False",
}


@pytest.fixture
def flat(project: Project):
    """Writes a flat file; two members lie in runs/."""
    for seed in range(2):
        save_member(project.folder / f"runs/fold{seed}", seed)

    def write(**changes: Any) -> Project:
        values = {key: value for key, value in {**EXAMPLE, **changes}.items() if value is not None}
        (project.folder / "setup_config.json").write_text(json.dumps(values))
        return project

    return write


def test_the_examples_keys_alone_are_served(flat, make_context, ask) -> None:
    assert flat().run("tiny") == 0
    folder = flat().unpack()
    assert [member.name for member in read_manifest(folder).members] == ["fold0", "fold1"]
    settings = json.loads((folder / "setup_config.json").read_text())
    (folder / "setup_config.json").write_text(json.dumps({**settings, "execution": "eager"}))
    handler = BertEnsembleHandler()
    handler.initialize(make_context(folder))
    replies = ask(handler, [{"body": b"a cat sat"}] * 2, [{}, {"explain": "True"}])
    assert [status for status, _ in replies] == [200, 200]
    assert replies[0][1]["prediction"]["index"] == replies[1][1]["explanations"][0]["index"]
    assert (handler.settings.max_length, handler.settings.name) == (30, "tiny")


@pytest.mark.parametrize(
    ("name", "arguments", "built"),
    [(None, ["tiny"], "tiny"), (None, ["--all"], "ens"), ("mine", ["--all"], "mine"), ("mine", ["tiny"], "tiny")],
)
def test_its_name_is_the_command_lines_the_files_or_ens(flat, name, arguments, built: str, capsys) -> None:
    project = flat(name=name)
    assert project.run(*arguments) == 0
    assert project.leftovers() == [f"{built}.mar"]
    assert project.run("--list") == 0
    assert f"{name or 'ens':<20}bert_handler.py" in capsys.readouterr().out


def test_members_are_the_command_lines_or_what_the_example_downloaded(flat) -> None:
    assert flat(model_name="bert-base-uncased").run("tiny", "--members", "runs/fold1") == 0
    folder = flat().unpack()
    assert [member.name for member in read_manifest(folder).members] == ["fold1"]
    assert json.loads((folder / "setup_config.json").read_text())["model_name"] == "bert-base-uncased"
    save_member(flat().folder / "Transformer_model")
    assert read_flat({"model_name": "bert-base-uncased"}, flat().folder, "")["members"] == ["Transformer_model"]
    assert read_flat({"model_name": "runs"}, flat().folder, "")["members"] == ["runs"]


def test_the_folder_of_a_model_stays_at_home(flat) -> None:
    project = flat(model_name=str(flat().folder / "runs" / "fold0"))
    assert project.run("tiny") == 0
    text = (project.unpack() / "setup_config.json").read_text()
    assert json.loads(text)["model_name"] == "fold0"
    assert str(project.folder) not in text


@pytest.mark.parametrize(
    "changes", [{"FasterTransformer": "True"}, {"FasterTransformer": True}, {"save_mode": "torchscript"}]
)
def test_faster_transformer_chooses_its_handler(flat, changes) -> None:
    project = flat(**changes, num_labels="0", library_path="lib.so", pretrained="runs/fold0", model_name=None)
    torch.jit.script(Doubled()).save(str(project.folder / "t0.pt"))
    (project.folder / "lib.so").write_bytes(b"no real library")
    assert project.run("tiny", "--members", "t0.pt") == 0
    settings = json.loads((project.unpack() / "setup_config.json").read_text())
    expected = {"handler": "ft_bert_handler.py", "save_mode": "torchscript", "FasterTransformer": True}
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_parallel": "true"}, "model_parallel: one device holds all members here"),
        ({"do_lower_case": "perhaps"}, "do_lower_case: expected true or false, got 'perhaps'"),
        ({"max_length": "long"}, "max_length: expected a whole number, got 'long'"),
        ({"num_labels": "5"}, "num_labels: the settings say 5, the members' config.json has 2 labels"),
        ({"mode": "text_generation"}, "mode: expected one of sequence_classification"),
        ({"max_lenght": "9"}, "unknown key 'max_lenght'; did you mean 'max_length'?"),
        ({"model_name": "bert-base-uncased"}, "no members: expected at least one checkpoint; give --members"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(flat, changes, message: str, capsys) -> None:
    project = flat(**changes)
    assert project.run("tiny") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert project.leftovers() == []


def test_modes_are_read_as_older_examples_write_them(tmp_path) -> None:
    assert read_flat({"mode": "sequence classification"}, tmp_path, "")["mode"] == "sequence_classification"
    with pytest.raises(ArchiveError, match="num_labels: expected a whole number, got True"):
        read_flat({"num_labels": True}, tmp_path, "")


def test_a_number_of_labels_concerns_classifications_only(flat) -> None:
    project = flat(mode="embedding", num_labels="7", embedding_name=None)
    assert project.run("tiny") == 0
